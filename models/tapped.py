"""What a network gives besides its logits: the outputs of layers inside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..quant.registry import unknown


@dataclass(frozen=True)
class Outputs:
    """What a network made of a batch.

    Attributes:
        logits: (N, K).
        features: layer name -> its output, for the layers that were asked for.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


def tapped(model: nn.Module, x: Tensor, layers: Iterable[str] = ()) -> Outputs:
    """Runs any network on a batch and keeps what some of its layers gave.

    The network is not changed: hooks are there during this call only. Of a layer that runs more
    than once, the last output counts. Without layers this is a plain call.

    Args:
        layers: as in `model.named_modules()`; in a quantized network the same names.

    Raises:
        ValueError: there is no such layer, or its output cannot be used.
    """
    wanted = list(dict.fromkeys(layers))
    if not wanted:
        return Outputs(model(x))
    found: dict[str, tuple[Tensor, int]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(f"layer {name!r} gives no tensor, but {type(output).__name__}")
            found[name] = output, output._version

        return hook

    modules = _modules(model, wanted)
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        logits = model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return Outputs(logits, {name: _unchanged(name, found) for name in wanted})


def check_layers(model: nn.Module, layers: Iterable[str]) -> None:
    """Looks for layers by name.

    Raises:
        ValueError: there is no layer of that name; the message lists near ones.
    """
    _modules(model, layers)


def _modules(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Module]:
    known = {name: module for name, module in model.named_modules() if name}
    for name in layers:
        if name not in known:
            raise ValueError(_no_layer(name, known))
    return {name: known[name] for name in layers}


def _no_layer(name: str, known: dict[str, nn.Module]) -> str:
    """Lists the outermost layers, or those beside it where the name begins like one of them."""
    parent = name.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    beside = [each for each in known if each.rpartition(".")[0] == parent]
    return unknown("layer", name, beside or known)


def _unchanged(name: str, found: dict[str, tuple[Tensor, int]]) -> Tensor:
    if name not in found:
        raise ValueError(f"layer {name!r} does not run in the forward pass; name another")
    output, version = found[name]
    if output._version != version:
        raise ValueError(
            f"what layer {name!r} gives is overwritten by the one after it (an in-place ReLU or "
            "addition); name that one, or the block around both"
        )
    return output
