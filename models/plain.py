"""Plain convolutional networks, the small students of teacher-assistant distillation."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from .blocks import (
    ActivationKind,
    SoleReaders,
    activation_maker,
    at_depth,
    check_structure,
    conv,
    initialise,
    widened,
)
from .registry import MODELS

# Convolutions between two poolings; each group has twice the channels of the one before.
GROUPS = {2: (1, 1), 4: (2, 2), 6: (2, 2, 2), 8: (2, 2, 2, 2), 10: (2, 2, 2, 4)}


class PlainConvNet(nn.Module):
    """Plain CNN without shortcuts: groups of 3x3 convolutions with max pooling between them.

    Args:
        depth: number of convolutions: 2, 4, 6, 8 or 10.
        num_classes: logits, K.
        in_channels: channels of the images, C.
        image_size: their height and width, at least 4; a map of one pixel is not pooled further.
        width: channels of the first group; each later group doubles them.
        widen: factor on the channels of every layer (WRPN), to the nearest whole `width`.
        activation: ReLU, or RPReLU, after which quantizers of inputs are signed.
        activation_clip: largest value that a ReLU lets pass; None for no limit.

    Source: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, AAAI 2020,
        arXiv:1902.03393. Differs from it in: batch norm, channels that always double, and global
        average pooling with one linear layer in place of its fully connected ones.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        width: int = 16,
        widen: float = 1.0,
        activation: ActivationKind = "relu",
        activation_clip: float | None = None,
    ) -> None:
        super().__init__()
        check_structure(num_classes, in_channels, image_size, width)
        width = widened(width, widen)
        make_activation = activation_maker(activation, activation_clip)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels, index = in_channels, 0
        for group, convolutions in enumerate(GROUPS[depth]):
            if group and image_size > 1:
                layers[f"pool{group}"] = nn.MaxPool2d(2)
                image_size //= 2
            for _ in range(convolutions):
                index += 1
                layers[f"conv{index}"] = conv(channels, width << group, 3)
                layers[f"bn{index}"] = nn.BatchNorm2d(width << group)
                layers[f"act{index}"] = make_activation(width << group)
                channels = width << group
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    @property
    def sole_readers(self) -> SoleReaders:
        """See `blocks`; pooling, where it follows, is no layer with weights."""
        names = [name for name, _ in self.features.named_children()]
        return {
            f"features.{name}": (f"features.{after}",)
            for name, after in pairwise(names)
            if name.startswith("act") and after.startswith("conv")
        }

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        return self.fc(self.features(x).mean((2, 3)))


for _depth in GROUPS:
    MODELS.register(f"plane{_depth}")(at_depth(PlainConvNet, _depth))
