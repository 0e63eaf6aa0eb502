"""A layer whose weight and input are quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .core import Quantizer

if TYPE_CHECKING:
    from .policy import LayerPlan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
QUANTIZABLE = (*CONVOLUTIONS, nn.Linear)


class QuantLayer(nn.Module):
    """Runs a layer on its quantized weight and its quantized input.

    The layer keeps its own weight (the latent one), bias, dilation, groups and padding mode.

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

    @property
    def weight(self) -> nn.Parameter:
        """The latent weight."""
        return cast(nn.Parameter, self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, in the shape that the layer gives."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        layer: Any = self.layer
        weight: Tensor = self.weight
        if self.weight_quantizer is not None:
            weight = self.weight_quantizer(weight)
        # The plain layers are called directly: functional_call costs as much as a small layer.
        if type(layer) is nn.Linear:
            output = F.linear(x, weight, layer.bias)
        elif type(layer) in CONVOLUTIONS:
            output = layer._conv_forward(x, weight, layer.bias)
        else:
            output = functional_call(layer, {"weight": weight}, (x,))
        return output
