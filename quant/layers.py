"""A layer whose weight and input are quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .core import Quantizer

if TYPE_CHECKING:
    from .policy import LayerPlan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QUANTIZABLE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


class QuantLayer(nn.Module):
    """Runs a layer on its quantized weight and its quantized input.

    The layer keeps its own weight (the latent one), bias, dilation, groups and padding mode. Its
    bias and its plain settings (`stride`, `in_features`, ...) can be read here too, because code
    around a layer may do so.

    Args:
        layer: any layer whose parameter `weight` is to be quantized; run by its own forward.
        weight_quantizer: None leaves the weight as it is.
        input_quantizer: None leaves the input as it is.
    """

    plan: LayerPlan | None = None  # what built the two quantizers, where a policy did

    def __init__(
        self,
        layer: nn.Module,
        weight_quantizer: Quantizer | None,
        input_quantizer: Quantizer | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = weight_quantizer
        self.input_quantizer = input_quantizer
        for setting in getattr(layer, "__constants__", ()):
            if hasattr(layer, setting) and not hasattr(self, setting):
                setattr(self, setting, getattr(layer, setting))

    @property
    def latent(self) -> nn.Parameter:
        """The parameter that training moves, in the layer's own layout."""
        return cast(nn.Parameter, self.layer.weight)

    @property
    def weight(self) -> Tensor:
        """The latent weight as quantizers see it, (O, I, *kernel) or (O, I).

        The parameter itself, or a view of it for a transposed convolution, whose O is the number
        of output channels of one group; a gradient goes to the parameter, and so does a change
        in place.
        """
        return turned(self.layer, self.latent)

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias."""
        return cast("nn.Parameter | None", self.layer.bias)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, in the shape that the layer gives; further arguments are its own."""
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        layer: Any = self.layer
        weight: Tensor = self.latent
        if self.weight_quantizer is not None:
            weight = turned(layer, self.weight_quantizer(self.weight))
        # The plain layers are called directly: functional_call costs as much as a small layer.
        if type(layer) is nn.Linear and not hooked(layer):
            output = F.linear(x, weight, layer.bias)
        elif type(layer) in CONVOLUTIONS and not hooked(layer):
            output = layer._conv_forward(x, _restrided(weight, self.latent), layer.bias)
        else:
            output = functional_call(layer, {"weight": weight}, (x, *args), kwargs)
        return output


def hooked(layer: nn.Module) -> bool:
    """Whether somebody hung hooks on it."""
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    return bool(before or after or layer._backward_hooks or layer._backward_pre_hooks)


def _restrided(weight: Tensor, latent: Tensor) -> Tensor:
    """The weight with the strides of the latent one, of which it is a dense copy.

    With one input channel (grey images) the strides of shape (O, 1, h, w) can be told in two ways.
    Arithmetic picks the contiguous one, and the whole first stage would leave channels last.
    """
    if weight.shape[1] != 1 or weight.stride() == latent.stride() or not latent.is_contiguous():
        return weight
    return weight.as_strided(weight.shape, latent.stride())


def turned(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight from the layer's own layout to (O, I, *kernel), or back: the same exchange.

    Only a transposed convolution stores its input channels first.
    """
    return weight.transpose(0, 1) if isinstance(layer, TRANSPOSED) else weight


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a layer was called with, by position or by name."""
    return cast(Tensor, args[0] if args else kwargs["input"])
