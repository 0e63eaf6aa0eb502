"""The network that files hold: weights quantized for good, batch norm as a scale and a shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import QTensor
from ..fold import NORMS
from ..layers import hooked, turned
from ..probing import names_of
from ..swap import quant_layers, weight_layers


class ChannelAffine(nn.Module):
    """Batch norm in evaluation: y = x * scale + shift, for each channel.

    Args:
        channels: size of axis 1 of the input.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("shift", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) to the same shape."""
        view = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(self.shift.view(view), x, self.scale.view(view))


@torch.no_grad()
def coded_weights(model: nn.Module) -> dict[str, QTensor]:
    """The weights that have a quantizer as codes, (O, I, *kernel), by layer name.

    Of layers that share a weight the first has it.
    """
    found = {}
    for name, layer in weight_layers(model).items():
        assert layer.weight_quantizer is not None
        found[name] = layer.weight_quantizer.encode(layer.weight)
    return found


@torch.no_grad()
def make_canonical(model: nn.Module, weights: Mapping[str, QTensor]) -> nn.Module:
    """Puts coded weights into a quantized model, and `ChannelAffine`s for its batch norms.

    In place. The codes themselves stay with the caller; nothing here can be trained any more.

    Args:
        model: with `QuantLayer`s.
        weights: from `coded_weights` of this model, or of one of the same build; all of them.

    Returns:
        The model, in evaluation mode.
    """
    model.eval()
    layers = quant_layers(model)
    fixed: dict[nn.Parameter, nn.Parameter] = {}
    for name, layer in weight_layers(model).items():
        values = turned(layer.layer, weights[name].dequantize())
        # with the very strides: of a grey image's weight both memory formats have one content, and
        # which name its strides bear decides how the convolution adds
        fixed[layer.latent] = nn.Parameter(
            torch.empty_like(layer.latent).copy_(values), requires_grad=False
        )
    for layer in layers.values():
        if layer.weight_quantizer is not None:
            layer.layer.weight = fixed[layer.latent]
            layer.weight_quantizer = None
    for norm, places in names_of(model).items():
        if type(norm) in NORMS and norm.running_mean is not None and not hooked(norm):
            affine = _affine(norm)
            for place in places:
                parent, _, child = place.rpartition(".")
                setattr(model.get_submodule(parent), child, affine)
    return model.requires_grad_(False)


def _affine(norm: Any) -> ChannelAffine:
    """In float64, rounded once."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    affine = ChannelAffine(len(scale)).to(scale.device)
    affine.scale.copy_(scale)
    affine.shift.copy_(shift)
    return affine.eval()
