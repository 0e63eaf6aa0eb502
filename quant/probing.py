"""What a network does with a few batches: which layers run, in which order, on what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .layers import CONVOLUTIONS, QUANTIZABLE, QuantLayer

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class LayerFacts:
    """One layer that can be quantized, as the probe saw it.

    Attributes:
        name: its first name in the model; aliases: further names of the same module.
        kind: class name, e.g. Conv2d.
        signed_input: whether a value below zero came in.
        in_channels, out_channels: of the whole layer, all groups together.
        kernel: kernel size; empty for a linear layer.
        output_shape: of one sample of one call, without the batch axis.
        macs: multiply-accumulates for one sample, over all calls.
        calls: how often one forward pass runs it; above 1 it stands at several places.
    """

    name: str
    kind: str
    signed_input: bool
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    calls: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What a probe pass found.

    Attributes:
        layers: facts by name, in the order of first execution.
        skipped: what has weights and cannot be quantized: name -> kind and reason.
    """

    layers: Mapping[str, LayerFacts]
    skipped: Mapping[str, str]

    @property
    def shared(self) -> tuple[str, ...]:
        """Layers that stand at several places: one weight and one input quantizer serve all."""
        return tuple(n for n, f in self.layers.items() if f.calls > 1 or f.aliases)


def probe(model: nn.Module, batches: Iterable[Any]) -> Probe:
    """Runs the float model on a few batches, in evaluation mode; it is left as it was.

    Args:
        model: not yet quantized.
        batches: inputs (N, ...), or tuples that begin with them.

    Raises:
        ValueError: no batch, or a model that is quantized already.
    """
    if any(isinstance(m, QuantLayer) for m in model.modules()):
        raise ValueError("the model is quantized already; probe the float model")
    seen: dict[nn.Module, LayerFacts] = {}
    names = _names(model)
    count = 0

    def look(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        negative = bool((x < 0).any())
        if (facts := seen.get(module)) is None:
            seen[module] = _facts(module, names[module], negative, output)
        elif count == 0:
            macs = facts.macs + _macs(module, output)
            signed = facts.signed_input or negative
            seen[module] = replace(facts, calls=facts.calls + 1, macs=macs, signed_input=signed)
        elif negative:
            seen[module] = replace(facts, signed_input=True)

    hooks = [
        module.register_forward_hook(look, with_kwargs=True)
        for module in names
        if isinstance(module, QUANTIZABLE)
    ]
    try:
        with evaluating(model), torch.no_grad():
            for x in inputs_of(batches, model):
                model(x)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise ValueError("the probe needs at least one batch")
    return Probe({f.name: f for f in seen.values()}, _skipped(model, set(seen)))


def inputs_of(batches: Iterable[Any], model: nn.Module) -> Iterator[Tensor]:
    """The input of each batch, on the model's device."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield x.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _facts(module: Any, names: list[str], negative: bool, output: Tensor) -> LayerFacts:
    conv = isinstance(module, CONVOLUTIONS)
    weight = module.weight
    return LayerFacts(
        name=names[0],
        aliases=tuple(names[1:]),
        kind=type(module).__name__,
        signed_input=negative,
        in_channels=module.in_channels if conv else weight.shape[1],
        out_channels=weight.shape[0],
        kernel=tuple(module.kernel_size) if conv else (),
        output_shape=tuple(output.shape[1:]),
        macs=_macs(module, output),
        calls=1,
    )


def _macs(module: Any, output: Tensor) -> int:
    """Each output value is a sum over one filter: (I / groups) * kernel values."""
    return math.prod(output.shape[1:]) * math.prod(module.weight.shape[1:])


def _skipped(model: nn.Module, seen: set[nn.Module]) -> dict[str, str]:
    """Modules that hold a parameter of two or more axes and will stay in float."""
    skipped = {}
    for name, module in model.named_modules():
        shapes = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if not shapes or module in seen or isinstance(module, NORMS):
            continue
        called = "was not run by the probe" if isinstance(module, QUANTIZABLE) else "not supported"
        skipped[name] = f"{type(module).__name__}: {called}"
    return skipped
