"""The original ResNets for small images (He et al., CVPR 2016, arXiv:1512.03385)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from .bireal import PostActBiReal, ReAct
from .blocks import (
    BLOCK_FACTS,
    DEPTHS,
    ActivationKind,
    BlockKind,
    MakeActivation,
    ShortcutKind,
    SoleReaders,
    activation_maker,
    at_depth,
    blocks_per_stage,
    check_structure,
    conv,
    initialise,
    norm_after,
    pool_before,
    readers_between_blocks,
    residual_stages,
    shortcut_path,
    widened,
)
from .registry import MODELS


class CifarResNet(nn.Module):
    """The original ResNet for small images: ReLU after the sum of block and shortcut.

    A 3x3 stem, three stages at strides 1, 2, 2, global average pooling, a linear classifier.
    With bottleneck blocks the depth counts three convolutions a block, so 20, 56 and 110 exist.

    Args:
        depth: layers with weights on the longest path, shortcuts not counted.
        num_classes: logits, K.
        in_channels: channels of the images, C.
        image_size: their height and width, at least 4; the weights do not depend on it.
        block: "basic", two 3x3 convolutions; "bottleneck", 1x1, 3x3, 1x1 with four times the
            channels outside; "bireal" and "react", two 3x3 convolutions with a shortcut around
            each, and the activation before the convolution or after the sum.
        width: channels of the first stage's 3x3 convolutions; the next stages double them.
        widen: factor on the channels of every layer (WRPN), to the nearest whole `width`.
        activation: ReLU; RPReLU or Hardtanh, after which quantizers of inputs are signed; None
            for the block's own: Hardtanh for bireal, RPReLU for react, else ReLU.
        activation_clip: largest value that a ReLU lets pass; None for no limit.
        shortcut: where the shape changes, "conv", a 1x1 convolution with batch norm; "pool", the
            same after average pooling; "pad", zeros for the new channels; None for the block's
            own: pool for bireal and react, else conv.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.
        Differs from it in: the default shortcut is a convolution (their option B); theirs pads.
        Other blocks: see `PostActBiReal` and `ReAct`.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        block: BlockKind = "basic",
        width: int = 16,
        widen: float = 1.0,
        activation: ActivationKind | None = None,
        activation_clip: float | None = None,
        shortcut: ShortcutKind | None = None,
    ) -> None:
        super().__init__()
        check_structure(num_classes, in_channels, image_size, width)
        width = widened(width, widen)
        blocks, facts = blocks_per_stage(depth, block, BLOCKS), BLOCK_FACTS[block]
        make_activation = activation_maker(activation or facts.activation, activation_clip)
        unit = partial(
            BLOCKS[block], make_activation=make_activation, shortcut=shortcut or facts.shortcut
        )

        self.conv1 = conv(in_channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        # a Bi-Real block begins with the activation
        self.act1 = nn.Identity() if block == "bireal" else make_activation(width)
        self.layer1, self.layer2, self.layer3 = residual_stages(
            unit, blocks=blocks, width=width, expansion=facts.expansion
        )
        self.fc = nn.Linear(4 * width * facts.expansion, num_classes)
        initialise(self)

    @property
    def sole_readers(self) -> SoleReaders:
        """See `blocks`."""
        return readers_between_blocks(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class PostActBasic(nn.Module):
    """Two 3x3 convolutions, each with batch norm, and ReLU after the sum."""

    sole_readers: ClassVar[SoleReaders] = {"act1": ("conv2",)}
    last_activation: ClassVar[str] = "act2"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        make_activation: MakeActivation,
        shortcut: ShortcutKind,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = make_activation(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut_pool = pool_before(shortcut, stride)
        self.shortcut = shortcut_path(shortcut, in_channels, out_channels, stride)
        self.shortcut_bn = norm_after(self.shortcut)
        self.act2 = make_activation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        identity = x
        if self.shortcut is not None:
            identity = self.shortcut_bn(self.shortcut(self.shortcut_pool(x)))
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + identity)


class PostActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride and a quarter of the channels."""

    sole_readers: ClassVar[SoleReaders] = {"act1": ("conv2",), "act2": ("conv3",)}
    last_activation: ClassVar[str] = "act3"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        make_activation: MakeActivation,
        shortcut: ShortcutKind,
    ) -> None:
        super().__init__()
        channels = out_channels // BLOCK_FACTS["bottleneck"].expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = make_activation(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut_pool = pool_before(shortcut, stride)
        self.shortcut = shortcut_path(shortcut, in_channels, out_channels, stride)
        self.shortcut_bn = norm_after(self.shortcut)
        self.act3 = make_activation(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        identity = x
        if self.shortcut is not None:
            identity = self.shortcut_bn(self.shortcut(self.shortcut_pool(x)))
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return self.act3(self.bn3(self.conv3(y)) + identity)


BLOCKS: dict[BlockKind, type[nn.Module]] = {
    "basic": PostActBasic,
    "bottleneck": PostActBottleneck,
    "bireal": PostActBiReal,
    "react": ReAct,
}

for _depth in DEPTHS:  # torchvision has the names resnet18, resnet34, ...
    MODELS.register(f"cifar_resnet{_depth}")(at_depth(CifarResNet, _depth))
