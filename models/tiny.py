"""A network that trains in seconds, for tests and first tries."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .blocks import (
    ActivationKind,
    SoleReaders,
    activation_maker,
    check_structure,
    conv,
    initialise,
    widened,
)
from .registry import MODELS


@MODELS.register("tiny_convnet")
class TinyConvNet(nn.Module):
    """Two 3x3 convolutions, the second at stride 2, and a linear classifier.

    Args:
        num_classes: logits, K.
        in_channels: channels of the images, C.
        image_size: their height and width, at least 4; the weights do not depend on it.
        width: channels of the first convolution; the second doubles them.
        widen: factor on the channels of every layer (WRPN), to the nearest whole `width`.
        activation: ReLU, or RPReLU, after which quantizers of inputs are signed.
        activation_clip: largest value that a ReLU lets pass; None for no limit.
    """

    sole_readers: ClassVar[SoleReaders] = {"act1": ("conv2",)}

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        width: int = 8,
        widen: float = 1.0,
        activation: ActivationKind = "relu",
        activation_clip: float | None = None,
    ) -> None:
        super().__init__()
        check_structure(num_classes, in_channels, image_size, width)
        width = widened(width, widen)
        make_activation = activation_maker(activation, activation_clip)
        self.conv1 = conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(width)
        self.conv2 = conv(width, 2 * width, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.act2 = make_activation(2 * width)
        self.fc = nn.Linear(2 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))
