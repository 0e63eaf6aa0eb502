"""What the networks of this folder are made of.

A class that holds activations has an attribute `sole_readers`: name of an activation -> names of
the layers with weights that read it, where nothing else does and they read nothing else. What
comes after in the network is free to leave such an activation out (`quant/absorb.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from .rprelu import RPReLU

BlockKind = Literal["basic", "bottleneck", "bireal", "react"]
ShortcutKind = Literal["conv", "pad", "pool"]
ActivationKind = Literal["relu", "rprelu", "hardtanh"]
MakeActivation = Callable[[int], nn.Module]  # from its number of channels
SoleReaders = Mapping[str, tuple[str, ...]]

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)


@dataclass(frozen=True)
class BlockFacts:
    """What a kind of block has, and what it takes where an option is left open.

    Attributes:
        convolutions: on the path through it.
        expansion: its output channels over its 3x3 channels.
        activation, shortcut: those of its paper.
    """

    convolutions: int = 2
    expansion: int = 1
    activation: ActivationKind = "relu"
    shortcut: ShortcutKind = "conv"


BLOCK_FACTS: dict[BlockKind, BlockFacts] = {
    "basic": BlockFacts(),
    "bottleneck": BlockFacts(convolutions=3, expansion=4),
    "bireal": BlockFacts(activation="hardtanh", shortcut="pool"),
    "react": BlockFacts(activation="rprelu", shortcut="pool"),
}


def at_depth(network: Callable[..., nn.Module], depth: int) -> Callable[..., nn.Module]:
    """The factory of one depth: `network` without its first argument, options unchanged."""
    factory = functools.partial(network, depth)
    factory.__doc__ = network.__doc__
    return factory


def check_structure(num_classes: int, in_channels: int, image_size: int, width: int) -> None:
    """Raises ValueError where no network of this folder has such a shape."""
    smallest = {"num_classes": 1, "in_channels": 1, "image_size": 4, "width": 1}
    values = (num_classes, in_channels, image_size, width)
    for (name, least), value in zip(smallest.items(), values, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def widened(width: int, widen: float) -> int:
    """`width` times the widening factor, to the nearest whole number and at least 1.

    Source: Mishra et al., WRPN, ICLR 2018, arXiv:1709.01134: more filters in every layer make up
        for fewer bits.
    """
    if isinstance(widen, bool) or not isinstance(widen, int | float) or not 0 < widen < math.inf:
        raise ValueError(f"widen must be a positive number, got {widen!r}")
    return max(round(width * widen), 1)


def activation_maker(kind: ActivationKind, clip: float | None) -> MakeActivation:
    """What makes the activation behind a number of channels.

    Args:
        kind: "relu"; or "rprelu" or "hardtanh" (-1 .. 1), whose outputs have both signs.
        clip: largest value that a ReLU lets pass: 6 is ReLU6, 1 is ReLU1; None for no limit.
    """
    if kind not in get_args(ActivationKind):
        raise ValueError(f"unknown activation {kind!r}; known: {_listed(ActivationKind)}")
    if clip is not None and kind != "relu":
        raise ValueError(f"activation_clip is for relu; {kind} has none, so leave it out")
    if kind == "rprelu":
        return RPReLU
    if kind == "hardtanh":
        return lambda channels: nn.Hardtanh()
    if clip is None:
        return lambda channels: nn.ReLU()
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 < clip < math.inf:
        raise ValueError(
            f"activation_clip must be a positive number, or null for none; got {clip!r}"
        )
    return lambda channels: nn.Hardtanh(0.0, float(clip))


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1; batch norm has the bias."""
    padding = kernel // 2
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)


class PadShortcut(nn.Module):
    """Every stride-th pixel, and zeros for the channels that are new.

    Source: He et al., CVPR 2016, arXiv:1512.03385, option A.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + new_channels, H / stride, W / stride), rounded up."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def shortcut_path(
    kind: ShortcutKind, in_channels: int, out_channels: int, stride: int
) -> nn.Module | None:
    """The way around a block; None where the block keeps the shape and x itself is added.

    Of "pool" the part with the weights; `pool_before` has the other.
    """
    if kind not in get_args(ShortcutKind):
        raise ValueError(f"unknown shortcut {kind!r}; known: {_listed(ShortcutKind)}")
    if in_channels == out_channels and stride == 1:
        return None
    if kind == "pad":
        return PadShortcut(out_channels - in_channels, stride)
    return conv(in_channels, out_channels, 1, stride if kind == "conv" else 1)


def pool_before(kind: ShortcutKind, stride: int) -> nn.Module:
    """Average pooling that takes over the stride of a "pool" shortcut; nothing for the others.

    Source: He et al., Bag of Tricks, CVPR 2019, arXiv:1812.01187, ResNet-D; Bi-Real's downsampling.
    """
    if kind == "pool" and stride > 1:
        return nn.AvgPool2d(stride, ceil_mode=True)  # rounded up, as a convolution does
    return nn.Identity()


def readers_of_entry(shortcut: nn.Module | None, pool: nn.Module) -> SoleReaders:
    """`sole_readers` of a pre-activation block's first activation.

    Args:
        shortcut: what stands in the block for `shortcut_path`; it may be quantized by now.
        pool: from `pool_before`.
    """
    if shortcut is None:  # x itself goes around the block
        return {"act1": ("conv1",)}
    return {"act1": ("conv1", "shortcut")} if _starts_with_weights(shortcut, pool) else {}


def readers_between_blocks(network: nn.Module) -> SoleReaders:
    """`sole_readers` of `act1` of the network, and of each block's `last_activation`.

    They are read by the next block: by layers alone where its shortcut has weights.
    """
    blocks = {n: m for n, m in network.named_modules() if hasattr(m, "last_activation")}
    ends = ["act1", *(f"{name}.{block.last_activation}" for name, block in blocks.items())]
    return {
        activation: (f"{name}.conv1", f"{name}.shortcut")
        for activation, (name, block) in zip(ends, blocks.items(), strict=False)
        if _starts_with_weights(block.shortcut, block.shortcut_pool)
    }


def _starts_with_weights(shortcut: object, pool: object) -> bool:
    padded = shortcut is None or isinstance(shortcut, PadShortcut)
    return not padded and isinstance(pool, nn.Identity)


def norm_after(shortcut: nn.Module | None) -> nn.Module:
    """Batch norm for a shortcut that is a convolution; nothing for the others."""
    return (
        nn.BatchNorm2d(shortcut.out_channels) if isinstance(shortcut, nn.Conv2d) else nn.Identity()
    )


def blocks_per_stage(depth: int, block: BlockKind, known: Collection[BlockKind]) -> int:
    """Blocks in each of the three stages; stem and classifier are the other two layers.

    Args:
        known: the kinds of block that the network has.

    Raises:
        ValueError: no such block, or the depth is not 6n + 2 (9n + 2 with bottlenecks).
    """
    if block not in known:
        raise ValueError(f"unknown block {block!r}; known: {', '.join(known)}")
    per_block = 3 * BLOCK_FACTS[block].convolutions  # layers that one block in each stage adds
    blocks, rest = divmod(depth - 2, per_block)
    if rest or blocks < 1:
        valid = ", ".join(str(d) for d in DEPTHS if (d - 2) % per_block == 0)
        raise ValueError(
            f"no ResNet of depth {depth} has {block} blocks: the depth must be {per_block}n + 2; "
            f"registered depths with {block} blocks: {valid}"
        )
    return blocks


def residual_stages(
    unit: Callable[[int, int, int], nn.Module],
    *,
    blocks: int,
    width: int,
    expansion: int,
    stages: int = 3,
) -> Iterator[nn.Sequential]:
    """Stages of (width, 2 width, 4 width, ...) * expansion channels and strides 1, 2, 2, ...

    Args:
        unit: makes a block from its input channels, output channels and stride.
        blocks: blocks in each stage; the first has the stride.
        width: channels that enter the first stage.
        expansion: output channels of a block over the stage's width.
        stages: how many.
    """
    in_channels = width
    for number in range(stages):
        out_channels = 2**number * width * expansion
        first = unit(in_channels, out_channels, 2 if number else 1)
        rest = [unit(out_channels, out_channels, 1) for _ in range(blocks - 1)]
        yield nn.Sequential(first, *rest)
        in_channels = out_channels


def initialise(network: nn.Module) -> None:
    """He's normal initialisation (fan out) for every convolution; the rest as torch has it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _listed(kinds: Any) -> str:
    return ", ".join(get_args(kinds))
