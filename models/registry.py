"""The networks that are known by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..quant.registry import Registry

# A factory takes (num_classes, in_channels, image_size), which the data decide, and after the `*`
# the options that YAML may set. It draws its weights from torch's global CPU generator, which
# `build_model` seeds and puts back.
MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
