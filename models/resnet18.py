"""ResNet-18 for small images: the ImageNet network with a 3x3 stem and no first pooling."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from .blocks import (
    ActivationKind,
    ShortcutKind,
    SoleReaders,
    activation_maker,
    check_structure,
    conv,
    initialise,
    readers_between_blocks,
    residual_stages,
    widened,
)
from .registry import MODELS
from .resnet import PostActBasic

STAGES = 4
BLOCKS_A_STAGE = 2


@MODELS.register("cifar_resnet18")
class CifarResNet18(nn.Module):
    """ResNet-18 as CIFAR-10 repositories have it: 3x3 stem, four stages, 11.2 million weights.

    Args:
        num_classes: logits, K.
        in_channels: channels of the images, C.
        image_size: their height and width, at least 4; the weights do not depend on it.
        width: channels of the first stage; the next stages double them.
        widen: factor on the channels of every layer (WRPN), to the nearest whole `width`.
        activation: ReLU; RPReLU or Hardtanh, after which quantizers of inputs are signed.
        activation_clip: largest value that a ReLU lets pass; None for no limit.
        shortcut: where the shape changes, "conv", a 1x1 convolution with batch norm; "pool", the
            same after average pooling; "pad", zeros for the new channels.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385,
        table 1. Differs from it in: the stem, a 3x3 convolution at stride 1 without pooling.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        width: int = 64,
        widen: float = 1.0,
        activation: ActivationKind = "relu",
        activation_clip: float | None = None,
        shortcut: ShortcutKind = "conv",
    ) -> None:
        super().__init__()
        check_structure(num_classes, in_channels, image_size, width)
        width = widened(width, widen)
        make_activation = activation_maker(activation, activation_clip)
        self.conv1 = conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(width)
        unit = partial(PostActBasic, make_activation=make_activation, shortcut=shortcut)
        found = residual_stages(
            unit, blocks=BLOCKS_A_STAGE, width=width, expansion=1, stages=STAGES
        )
        self.stages = nn.Sequential()
        for number, stage in enumerate(found, start=1):
            self.stages.add_module(f"layer{number}", stage)
        self.fc = nn.Linear(2 ** (STAGES - 1) * width, num_classes)
        initialise(self)

    @property
    def sole_readers(self) -> SoleReaders:
        """See `blocks`."""
        return readers_between_blocks(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        x = self.stages(self.act1(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))
