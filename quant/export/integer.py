"""Inference with whole numbers: what every file to ship is compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core import QTensor
from ..layers import QuantLayer, turned
from ..swap import quant_layers

EXACT_IN_FLOAT32 = 2**24
# how many units the largest level of a table may have: few, or the powers of two of shifts
UNITS = (*range(1, 256), *(2**exponent for exponent in range(8, 17)))
TOLERANCE = 2e-7  # of the largest level: a table is float32


@dataclass(frozen=True)
class Integers:
    """A quantized tensor as value = unit * integer.

    Attributes:
        integers: whole numbers in float64, in the shape of the codes.
        unit: float64, broadcastable to them.
    """

    integers: Tensor
    unit: Tensor


def as_integers(q: QTensor) -> Integers | None:
    """The codes of a uniform grid, mid-rise ones as 2 k - n, or of a table with a common unit.

    None where the levels are no multiples of one number: learned tables, odd zero points.
    """
    codes, scale = q.codes.double(), q.scale.double()
    if q.codebook is None:
        zero = torch.as_tensor(q.zero_point, dtype=torch.float64, device=codes.device)
        for parts in (1, 2):
            if bool((zero * parts == (zero * parts).round()).all()):
                return Integers(codes * parts - zero * parts, scale / parts)
        return None
    table = q.codebook.double()
    top = table.abs().amax()
    for parts in UNITS:
        whole = (table * (parts / top)).round()
        if bool(((table * (parts / top) - whole).abs() <= TOLERANCE * parts).all()):
            integers = replace(q, scale=torch.ones_like(scale), codebook=whole).dequantize()
            return Integers(integers, scale * (top / parts))
    return None


class IntegerLayer(nn.Module):
    """A layer that multiplies and adds the whole numbers behind its weight and its input.

    Sums are exact: in float32 where none can pass 2**24, else in float64.

    Args:
        layer: of a network in evaluation.
        weight: of the layer, (O, I, *kernel).
    """

    def __init__(self, layer: QuantLayer, weight: Integers) -> None:
        super().__init__()
        assert layer.input_quantizer is not None
        self.layer = layer.layer
        self.input_quantizer = layer.input_quantizer
        self.weight = weight

    def accumulate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of an input, whole numbers, and what each unit of the input stands for.

        Raises:
            ValueError: the levels of the input are no multiples of one number.
        """
        found = as_integers(self.input_quantizer.encode(x))
        if found is None:
            raise ValueError(f"{type(self.input_quantizer).__name__} has no whole numbers")
        weight = self.weight.integers
        largest = float(found.integers.abs().amax() * weight.abs().flatten(1).sum(1).amax())
        dtype = torch.float32 if largest < EXACT_IN_FLOAT32 else torch.float64
        arguments = {"weight": turned(self.layer, weight).to(dtype)}
        if self.layer.bias is not None:
            arguments["bias"] = torch.zeros_like(self.layer.bias, dtype=dtype)  # type: ignore[arg-type]
        sums = functional_call(self.layer, arguments, (found.integers.to(dtype),))
        return sums.double(), found.unit

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, float32: sums times units, plus the bias."""
        sums, unit = self.accumulate(x)
        axis = 1 if not isinstance(self.layer, nn.Linear) else -1
        shape = [1] * sums.dim()
        shape[axis] = -1
        scale = self.weight.unit.reshape(-1)
        if isinstance(self.layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            scale = scale.repeat(self.layer.groups)  # O is that of one group
        value = sums * (scale.view(shape) * unit.reshape(()))
        if self.layer.bias is not None:
            value = value + self.layer.bias.double().view(shape)  # type: ignore[operator]
        return value.float()


def integer_reference(model: nn.Module, weights: Mapping[str, QTensor]) -> nn.Module:
    """A copy of a canonical network whose quantized layers compute with whole numbers.

    Layers with a float weight or input stay, as do those of level tables without a unit.

    Args:
        model: from `make_canonical`, float32.
        weights: its codes.
    """
    model = copy.deepcopy(model)
    by_weight = {
        layer.latent: name for name, layer in quant_layers(model).items() if name in weights
    }
    for name, layer in list(quant_layers(model).items()):
        if layer.latent not in by_weight or layer.input_quantizer is None:
            continue
        found = as_integers(weights[by_weight[layer.latent]])
        site = layer.input_quantizer.site
        shape = [1, 1, 1, 1]
        shape[site.channel_axis] = site.channels
        example = layer.input_quantizer.encode(torch.zeros(shape, device=layer.latent.device))
        if found is None or as_integers(example) is None:
            continue
        swapped = IntegerLayer(layer, found).eval()
        parent, _, child = name.rpartition(".")
        if not name:
            return swapped
        setattr(model.get_submodule(parent), child, swapped)
    return model
