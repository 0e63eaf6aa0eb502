"""Leaving out a ReLU where the quantizer behind it clamps at zero anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard, cast

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import QuantLayer, hooked


def absorb_relus(model: nn.Module) -> int:
    """Leaves out each ReLU that only unsigned quantizers read, in place.

    Nothing that the model computes changes, nor what it learns, bit for bit: the quantizers clamp
    at zero and keep the gradient back there. Names of modules, state dict and plan stay. Whoever
    hooks the activation, a layer behind it or its quantizer sees relu(x), which is computed while
    the hook is there: for calibration, activation bin regularization, features and reports.

    Only where the network's own code says what reads an activation (`declared_readers`), as ours
    does: in any other network nothing happens. Plain ReLUs alone, without hooks.

    Args:
        model: with `QuantLayer`s.

    Returns:
        How many ReLUs are newly left out.
    """
    count = 0
    for activation, readers in list(declared_readers(model)):
        layers = [model.get_submodule(name) for name in readers]
        quantized = [layer for layer in layers if _clamps(layer)]
        if len(quantized) == len(layers) and _is_plain_relu(model.get_submodule(activation)):
            _put(model, activation, AbsorbedReLU(quantized))
            _mark(quantized, absorbs=True)
            count += 1
    return count


def restore_relus(model: nn.Module) -> None:
    """Puts the ReLUs back that `absorb_relus` left out, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AbsorbedReLU):
            _put(model, name, nn.ReLU())
            _mark(module.readers, absorbs=False)


def declared_readers(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The activations that nothing reads but layers with weights, and the names of these.

    From the attribute `sole_readers` of classes in the model, name -> names within the module. A
    subclass has to have its own: its forward pass may be another one.
    """
    for prefix, module in model.named_modules():
        if "sole_readers" in vars(type(module)):
            said = cast(Mapping[str, tuple[str, ...]], module.sole_readers)
            for activation, readers in said.items():
                yield _join(prefix, activation), tuple(_join(prefix, name) for name in readers)


class AbsorbedReLU(nn.Module):
    """Gives `x` itself, and relu(x) where that would be noticed.

    Args:
        readers: the layers that read it; they stay the model's and are no part of this module.
    """

    def __init__(self, readers: Sequence[QuantLayer]) -> None:
        super().__init__()
        self.readers = tuple(readers)  # a tuple, in which modules are not registered

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, which stays."""
        seen = hooked(self) or any(_sees_its_input(layer) for layer in self.readers)
        return F.relu(x) if seen else x


def _sees_its_input(layer: QuantLayer) -> bool:
    """Whether somebody looks at what comes in, or it is not quantized at the moment."""
    quantizer = layer.input_quantizer
    if quantizer is None or not quantizer.absorbs:
        return True
    return hooked(layer) or hooked(quantizer)


def _is_plain_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not module.inplace and not hooked(module)


def _clamps(layer: nn.Module) -> TypeGuard[QuantLayer]:
    quantizer = layer.input_quantizer if isinstance(layer, QuantLayer) else None
    return quantizer is not None and quantizer.clamps_at_zero


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module in the place of another, in the same mode."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, new.train(old.training))


def _mark(layers: Sequence[QuantLayer], *, absorbs: bool) -> None:
    for layer in layers:
        if layer.input_quantizer is not None:
            layer.input_quantizer.absorbs = absorbs


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
