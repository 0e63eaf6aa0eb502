"""Networks of stages: built from a spec, and built again from a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..models import build_model
from ..quant.calibrate import bake
from ..quant.policy import plan_from_dict
from ..quant.swap import apply_plan
from .data import DataBundle
from .record import MODEL, StageRecord
from .store import Store


def describe_network(model: Mapping[str, Any], data: DataBundle) -> dict[str, Any]:
    """What `build_network` needs, as JSON values: name, options, and the data's shape."""
    return {
        "name": model["name"],
        "options": dict(model["options"]),
        "num_classes": data.num_classes,
        "in_channels": data.in_channels,
        "image_size": data.image_size,
    }


def build_network(network: Mapping[str, Any], *, seed: int) -> nn.Module:
    """The FP32 network with fresh weights from a seed, in the memory format that suits."""
    model = build_model(
        network["name"],
        num_classes=network["num_classes"],
        in_channels=network["in_channels"],
        image_size=network["image_size"],
        options=network["options"],
        seed=seed,
    )
    return in_fastest_format(model)


def in_fastest_format(model: nn.Module) -> nn.Module:
    """Any network in the memory format in which it trains fastest, in place: channels last."""
    if _dies_of_channels_last(model):
        model.register_forward_pre_hook(_channels_first)
        return model.to(memory_format=torch.contiguous_format)
    return model.to(memory_format=torch.channels_last)


def _dies_of_channels_last(model: nn.Module) -> bool:
    """Whether it has a layer that must not run in the format that trains faster.

    The backward pass of a strided 1x1 convolution of fewer than 8 input channels writes beyond its
    memory in that format (torch 2.15 on one CPU thread: "double free or corruption").
    """
    return any(
        module.kernel_size == (1, 1) and module.stride != (1, 1) and module.in_channels < 8
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


def _channels_first(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The images with the strides of their shape: a convolution runs in the format of its input.

    Data come channels last. Of one channel `contiguous` would hand back the same strides.
    """
    images, *others = args
    return (images.clone(memory_format=torch.contiguous_format), *others)


def load_network(store: Store, record: StageRecord, device: torch.device) -> nn.Module:
    """A stage's trained network, quantizers and all, in eval mode.

    The stage's record says which layers carry which quantizers, so the weights load strictly.
    """
    network = record.network
    model = build_network(network, seed=0)
    if network.get("quantization"):
        model = apply_plan(model, plan_from_dict(network["quantization"]))
    model.load_state_dict(load_file(store.stages / record.key / MODEL), strict=True)
    return model.to(device).eval()


def load_teacher(store: Store, record: StageRecord, device: torch.device) -> nn.Module:
    """The same for distillation: weights quantized once, no gradients."""
    return bake(load_network(store, record, device))
