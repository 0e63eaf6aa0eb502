"""Other libraries' quantization-aware training, on the same network: rows where they are installed.

Each does what its defaults do. Neither is needed for anything else:
`pip install brevitas torchao` beside this project.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from textbook import swap_inner_convolutions
from torch import Tensor, nn


class NotInstalledError(Exception):
    """The library of a row is not here."""


def brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    """W4A4 for all convolutions but the first; scales of weights and inputs are learned."""
    _require("brevitas")
    from brevitas.nn import QuantConv2d
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    def swapped(conv: nn.Conv2d) -> nn.Module:
        quantized = QuantConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            bias=conv.bias is not None,
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=4,
            weight_scaling_impl_type="parameter_from_stats",
            input_quant=Uint8ActPerTensorFloat,
            input_bit_width=4,
            input_collect_stats_steps=1,  # from the second step on the scale is learned
        )
        quantized.weight.data.copy_(conv.weight.data)
        return quantized

    return swap_inner_convolutions(model, swapped)


def torchao(model: nn.Module, images: Tensor) -> nn.Module:
    """PT2E at 8 bits with its recipe for x86, the only one that trains convolutions."""
    _require("torchao")
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(model.train(), (images,), strict=True).module()
    prepared = prepare_qat_pt2e(exported, quantizer)
    return move_exported_model_to_train(prepared)


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise NotInstalledError(f"{package} is not installed")


def installed(package: str) -> str:
    """Its version."""
    return version(package) if find_spec(package) is not None else "not installed"
