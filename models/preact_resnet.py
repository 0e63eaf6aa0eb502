"""Pre-activation ResNets for small images (He et al., ECCV 2016, arXiv:1603.05027)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor, nn

from .bireal import PreActBiReal
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
    pool_before,
    readers_of_entry,
    residual_stages,
    shortcut_path,
    widened,
)
from .registry import MODELS

PreActBlockKind = Literal["basic", "bottleneck", "bireal"]


class PreActResNet(nn.Module):
    """Pre-activation ResNet for small images: batch norm and ReLU come before each convolution.

    A 3x3 stem, three stages at strides 1, 2, 2, global average pooling, a linear classifier.
    With bottleneck blocks the depth counts three convolutions a block, so 20, 56 and 110 exist.

    Args:
        depth: layers with weights on the longest path, shortcuts not counted.
        num_classes: logits, K.
        in_channels: channels of the images, C.
        image_size: their height and width, at least 4; the weights do not depend on it.
        block: "basic", two 3x3 convolutions; "bottleneck", 1x1, 3x3, 1x1 with four times the
            channels outside; "bireal", two 3x3 convolutions with a shortcut around each.
        width: channels of the first stage's 3x3 convolutions; the next stages double them.
        widen: factor on the channels of every layer (WRPN), to the nearest whole `width`.
        activation: ReLU; RPReLU or Hardtanh, after which quantizers of inputs are signed; None
            for the block's own: Hardtanh for bireal, else ReLU.
        activation_clip: largest value that a ReLU lets pass; None for no limit.
        shortcut: where the shape changes, "conv", a 1x1 convolution; "pool", average pooling and
            a 1x1 convolution; "pad", zeros for the new channels; None for the block's own: pool
            for bireal, else conv.

    Source: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016, arXiv:1603.05027.
        Differs from it in: the default shortcut is a convolution; theirs pads. Bi-Real blocks:
        see `PreActBiReal`.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        block: PreActBlockKind = "basic",
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
        channels = 4 * width * facts.expansion

        self.conv1 = conv(in_channels, width, 3)
        self.layer1, self.layer2, self.layer3 = residual_stages(
            unit, blocks=blocks, width=width, expansion=facts.expansion
        )
        self.bn = nn.BatchNorm2d(channels)
        self.act = make_activation(channels)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.act(self.bn(x)).mean((2, 3)))


class PreActBasic(nn.Module):
    """Two 3x3 convolutions; a shortcut with weights reads the pre-activated input."""

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
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = make_activation(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = make_activation(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut_pool = pool_before(shortcut, stride)
        self.shortcut = shortcut_path(shortcut, in_channels, out_channels, stride)

    @property
    def sole_readers(self) -> SoleReaders:
        """See `blocks`."""
        return {**readers_of_entry(self.shortcut, self.shortcut_pool), "act2": ("conv2",)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        y = self.act1(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(self.shortcut_pool(y))
        y = self.conv1(y)
        return self.conv2(self.act2(self.bn2(y))) + identity


class PreActBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride and a quarter of the channels."""

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
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = make_activation(in_channels)
        self.conv1 = conv(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = make_activation(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.act3 = make_activation(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.shortcut_pool = pool_before(shortcut, stride)
        self.shortcut = shortcut_path(shortcut, in_channels, out_channels, stride)

    @property
    def sole_readers(self) -> SoleReaders:
        """See `blocks`."""
        return {
            **readers_of_entry(self.shortcut, self.shortcut_pool),
            "act2": ("conv2",),
            "act3": ("conv3",),
        }

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        y = self.act1(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(self.shortcut_pool(y))
        y = self.conv1(y)
        y = self.conv2(self.act2(self.bn2(y)))
        return self.conv3(self.act3(self.bn3(y))) + identity


BLOCKS: dict[BlockKind, type[nn.Module]] = {
    "basic": PreActBasic,
    "bottleneck": PreActBottleneck,
    "bireal": PreActBiReal,
}

for _depth in DEPTHS:
    MODELS.register(f"preact_resnet{_depth}")(at_depth(PreActResNet, _depth))
