"""Blocks for binary networks: a shortcut around every convolution.

One bit leaves a 3x3 convolution of 16 channels 145 different outputs; a shortcut around each of
them carries the values themselves on. The names of layers are those of basic blocks.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .blocks import (
    MakeActivation,
    ShortcutKind,
    SoleReaders,
    conv,
    norm_after,
    pool_before,
    readers_of_entry,
    shortcut_path,
)


class PreActBiReal(nn.Module):
    """Batch norm, activation, 3x3 convolution and sum, twice.

    A shortcut with weights reads the pre-activated input, as in `PreActBasic`: the two differ in
    the shortcut around the second convolution, and in where the first one ends.

    Source: Liu et al., ECCV 2018, arXiv:1808.00278. Differs from it in: batch norm stands before
    the activation, in the order of XNOR-Net.
    """

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
        x = self.conv1(y) + identity
        return self.conv2(self.act2(self.bn2(x))) + x


class PostActBiReal(nn.Module):
    """Activation, 3x3 convolution, batch norm and sum, twice; nothing is done to the sums.

    With a sign in front of the convolutions the activation changes no value there, and shapes
    gradients alone.

    Source: Liu et al., Bi-Real Net, ECCV 2018, arXiv:1808.00278, figure 3. Differs from it in:
    nothing; its first training step, too, has a clip to -1 .. 1 where the sign will stand.
    """

    sole_readers: ClassVar[SoleReaders] = {"act1": ("conv1",), "act2": ("conv2",)}

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
        self.act1 = make_activation(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act2 = make_activation(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut_pool = pool_before(shortcut, stride)
        self.shortcut = shortcut_path(shortcut, in_channels, out_channels, stride)
        self.shortcut_bn = norm_after(self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        y = self.bn1(self.conv1(self.act1(x)))
        if self.shortcut is not None:
            x = self.shortcut_bn(self.shortcut(self.shortcut_pool(x)))
        x = y + x
        return self.bn2(self.conv2(self.act2(x))) + x


class ReAct(nn.Module):
    """3x3 convolution, batch norm, sum and activation, twice.

    Source: Liu et al., ReActNet, ECCV 2020, arXiv:2003.03488, section 4, as in its ResNet-18.
    Differs from it in: nothing; the sign with a learned shift before each convolution is the
    quantizer `reactnet`.
    """

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
        self.act2 = make_activation(out_channels)
        self.shortcut_pool = pool_before(shortcut, stride)
        self.shortcut = shortcut_path(shortcut, in_channels, out_channels, stride)
        self.shortcut_bn = norm_after(self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        y = self.bn1(self.conv1(x))
        if self.shortcut is not None:
            x = self.shortcut_bn(self.shortcut(self.shortcut_pool(x)))
        x = self.act1(y + x)
        return self.act2(self.bn2(self.conv2(x)) + x)
