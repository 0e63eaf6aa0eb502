"""Looking at the tensors inside a network while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .layers import QuantLayer, input_of
from .registry import unknown

Stage = Literal["input", "quantized", "output"]
Reduce = Callable[[str, Tensor], Any]


@contextmanager
def record(
    model: nn.Module,
    layers: str | Iterable[str] = "*",
    stage: Stage = "input",
    *,
    reduce: Reduce | None = None,
    attached: bool = False,
) -> Iterator[dict[str, Any]]:
    """Gathers what goes through layers of `model` while open: layer name -> tensor.

    The dictionary is emptied as each forward pass of `model` begins, so it holds the last one;
    afterwards it stays as it is. A layer that runs twice in a pass comes as `name` and `name#2`.
    What is no tensor is left out. Nothing is copied: the tensors are the network's own. Where a
    ReLU was absorbed (`absorb_relus`), what is gathered lies behind it.

    Args:
        layers: names, or globs over the names of layers: what has no modules inside, and each
            `QuantLayer` as one. A module that is neither is gathered by its full name.
        stage: "input", "quantized" (the input as the layer's input quantizer has rounded it) or
            "output".
        reduce: called with the module's name and the tensor; what it gives is kept instead, so
            that nothing large has to be. It may add up over passes in variables of its own.
        attached: with the gradient, and only where gradients are on. Else detached, always.

    Raises:
        ValueError: nothing fits one of the names, or its input is not quantized. In a pass: a
            tensor was overwritten before the pass ended, by an in-place layer; `reduce` sees it
            before that happens, `reduce=lambda _, x: x.clone()` keeps it.
    """
    if stage not in get_args(Stage):
        raise ValueError(unknown("stage", stage, get_args(Stage)))
    gathered: dict[str, Any] = {}
    versions: dict[str, int] = {}

    def clear(*_: Any) -> None:
        gathered.clear()
        versions.clear()

    def keep(name: str, x: Any) -> None:
        if not isinstance(x, Tensor) or (attached and not torch.is_grad_enabled()):
            return
        x = x if attached else x.detach()
        times = 1 + sum(key.partition("#")[0] == name for key in gathered)
        key = name if times == 1 else f"{name}#{times}"
        gathered[key] = kept = reduce(name, x) if reduce else x
        if isinstance(kept, Tensor) and not kept.is_inference():
            versions[key] = kept._version

    def check(*_: Any) -> None:
        for key, version in versions.items():
            if gathered[key]._version != version:
                raise ValueError(
                    f"the {stage} of layer {key!r} is overwritten by a layer that works in place "
                    "(a ReLU, an addition); keep a copy: reduce=lambda _, x: x.clone()"
                )

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(clear, prepend=True).remove)
        for name, module in _chosen(model, layers, stage).items():
            hooks.callback(_hang(module, name, stage, keep).remove)
        hooks.callback(model.register_forward_hook(check).remove)
        yield gathered


def _hang(module: nn.Module, name: str, stage: Stage, keep: Callable[[str, Any], None]) -> Any:
    if stage == "input":

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if args or "input" in kwargs:
                keep(name, input_of(args, kwargs))

        return module.register_forward_pre_hook(before, with_kwargs=True)
    place = module.input_quantizer if stage == "quantized" else module
    assert isinstance(place, nn.Module)
    return place.register_forward_hook(lambda _, args, output: keep(name, output))


def _chosen(model: nn.Module, layers: str | Iterable[str], stage: Stage) -> dict[str, nn.Module]:
    """The modules that names and globs mean, in the order of the model."""
    modules = dict(model.named_modules())
    known = dict(_layers(model))
    if stage == "quantized":
        known = {n: m for n, m in known.items() if getattr(m, "input_quantizer", None) is not None}
    found: set[str] = set()
    for name in [layers] if isinstance(layers, str) else layers:
        if name in known or (name in modules and stage != "quantized"):
            found.add(name)
        elif fits := [each for each in known if fnmatchcase(each, name)]:
            found.update(fits)
        elif name in modules or not known:
            raise ValueError(f"the input of {name!r} is not quantized, nothing to record")
        else:
            raise ValueError(unknown("layer", name, known))
    return {name: module for name, module in modules.items() if name in found}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What a network is built of, by name; of a `QuantLayer` nothing inside."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, QuantLayer):
            inside.update(module.modules())
        if isinstance(module, QuantLayer) or not list(module.children()):
            yield name, module
