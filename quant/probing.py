"""What a network does with a few batches: which layers run, in which order, on what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .layers import QUANTIZABLE, TRANSPOSED, QuantLayer, input_of, turned
from .parameter_use import Users, watch_parameters

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
KINDS = (  # what a rule may call a layer; see LayerFacts.kinds
    *(layer.__name__ for layer in QUANTIZABLE),
    *("convolution", "transposed", "depthwise", "grouped", "pointwise", "shortcut"),
)
SHORTCUT_NAMES = ("shortcut", "downsample")

Inputs = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class LayerFacts:
    """One layer that can be quantized, as the probe saw it.

    Attributes:
        name: its first name in the model; aliases: further names of the same module.
        kind: its class in torch, e.g. Conv2d, for a subclass too.
        signed_input: whether a value below zero came in.
        in_channels, out_channels: of the whole layer, all groups together.
        kernel: kernel size; empty for a linear layer.
        output_shape: of one sample of one call, without the batch axis.
        macs: multiply-accumulates for one sample, over all calls.
        calls: how often one forward pass runs it; above 1 it stands at several places.
        groups: 1 but for grouped convolutions.
        input_axis: where the channels of its input stand: 1 (N, C, *), or -1 for a linear layer.
        weight_channels: size of the first axis of the weight (O, I, *kernel).
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
    groups: int
    input_axis: int
    weight_channels: int
    aliases: tuple[str, ...] = ()

    @property
    def kinds(self) -> frozenset[str]:
        """The members of `KINDS` that it is: its class, and what is true of these.

        convolution, transposed (also a convolution); grouped: more than one group; depthwise: a
        group for each input channel (also grouped); pointwise: a convolution of kernel 1 and one
        group; shortcut: kernel 1, with "shortcut" or "downsample" in the name.
        """
        small = bool(self.kernel) and set(self.kernel) == {1}
        named = any(word in self.name for word in SHORTCUT_NAMES)
        true = {
            self.kind: True,
            "convolution": bool(self.kernel),
            "transposed": self.kind.startswith("ConvTranspose"),
            "grouped": self.groups > 1,
            "depthwise": 1 < self.groups == self.in_channels,
            "pointwise": small and self.groups == 1,
            "shortcut": small and named,
        }
        return frozenset(word for word, holds in true.items() if holds)


@dataclass(frozen=True)
class Probe:
    """What a probe pass found.

    Attributes:
        layers: facts by name, in the order of first execution.
        skipped: what has weights of two or more axes and stays in float: name -> kind and
            reason. A parameter that stands in no known layer comes with its own name.
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
        batches: inputs (N, ...), tuples that begin with them, or mappings of keyword arguments.

    Raises:
        ValueError: no batch, or a model that is quantized already.
    """
    if any(isinstance(m, QuantLayer) for m in model.modules()):
        raise ValueError("the model is quantized already; probe the float model")
    seen: dict[nn.Module, LayerFacts] = {}
    names = names_of(model)
    count = size = 0

    def look(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        x = input_of(args, kwargs)
        negative = bool((x < 0).any())
        if (facts := seen.get(module)) is None:
            macs = _macs(module, x, output) // size
            seen[module] = _facts(module, names[module], negative, x, output, macs)
        elif count == 0:
            macs = facts.macs + _macs(module, x, output) // size
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
        with evaluating(model), torch.no_grad(), watch_parameters(model) as users:
            for inputs in inputs_of(batches, model):
                size = _batch_size(inputs)
                call(model, inputs)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise ValueError("the probe needs at least one batch")
    skipped = _skipped(model, set(seen), users)
    return Probe({f.name: f for f in seen.values() if f.name not in skipped}, skipped)


def inputs_of(batches: Iterable[Any], model: nn.Module) -> Iterator[Inputs]:
    """What `call` takes of each batch, on the model's device.

    A batch is a tensor, a tuple that begins with one, or a mapping of keyword arguments.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    for batch in batches:
        if isinstance(batch, Mapping):
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        else:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            yield x.to(device)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for one tensor, or for keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


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


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names, the first one first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def weighty(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """What holds a parameter of two or more axes and is no norm: name, module, what it is.

    Layers come with their own name. Where a module holds a parameter for its own code to use
    (a class token), it is the parameter that is named.
    """
    for name, module in model.named_modules():
        large = {k: p for k, p in module.named_parameters(recurse=False) if p.dim() > 1}
        kind = type(module).__name__
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            continue  # belongs to the layer around it
        if isinstance(module, QUANTIZABLE):
            yield name, module, kind
        elif not large or isinstance(module, NORMS):
            continue
        elif isinstance(module, nn.MultiheadAttention):
            packed = " and ".join(large)
            yield name, module, f"{kind}: its packed projections ({packed}) go into a function"
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            yield name, module, f"{kind}: recurrent weights go into one function"
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield name, module, f"{kind}: a table to look rows up in"
        else:
            for key, parameter in large.items():
                shape = tuple(parameter.shape)
                what = f"parameter: {shape}, for code of {kind} itself to use"
                yield f"{name}.{key}" if name else key, module, what


def _facts(
    module: Any, names: list[str], negative: bool, x: Tensor, output: Tensor, macs: int
) -> LayerFacts:
    linear = isinstance(module, nn.Linear)
    kernel = () if linear else tuple(module.kernel_size)
    return LayerFacts(
        name=names[0],
        aliases=tuple(names[1:]),
        kind=next(kind.__name__ for kind in QUANTIZABLE if isinstance(module, kind)),
        signed_input=negative,
        in_channels=module.in_features if linear else module.in_channels,
        out_channels=module.out_features if linear else module.out_channels,
        kernel=kernel,
        output_shape=tuple(output.shape[1:]),
        macs=macs,
        calls=1,
        groups=1 if linear else module.groups,
        input_axis=-1 if linear else x.dim() - len(kernel) - 1,  # 0 in a sample without a batch
        weight_channels=turned(module, module.weight).shape[0],
    )


def _macs(module: Any, x: Tensor, output: Tensor) -> int:
    """Each value of the output (of the input, if transposed) meets one filter of the weight."""
    values = x if isinstance(module, TRANSPOSED) else output
    return values.numel() * math.prod(module.weight.shape[1:])


def _batch_size(inputs: Inputs) -> int:
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 1) or 1


def _skipped(model: nn.Module, called: set[nn.Module], users: Users) -> dict[str, str]:
    """What stays in float, and why."""
    skipped = {}
    for name, module, what in weighty(model):
        if not isinstance(module, QUANTIZABLE):
            skipped[name] = what
        elif why := _why_not(module, called, users):
            skipped[name] = f"{what}: {why}"
    return skipped


def _why_not(module: nn.Module, called: set[nn.Module], users: Users) -> str | None:
    """What keeps a convolution or linear layer from being quantized."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (weight norm, a parametrization)"
    # tied layers that are called share a quantizer; everyone else would see the weight in float
    others = [
        user
        for user in users.get(weight, {})
        if not (user in called and user._parameters.get("weight") is weight)
    ]
    if others and module not in called:
        return f"used by {type(others[0]).__name__} as a function, not called"
    if others:
        return f"its weight also goes into a function of {type(others[0]).__name__}, in float"
    if module not in called:
        return "not run in evaluation mode (an unused branch, or one for training only)"
    return None
