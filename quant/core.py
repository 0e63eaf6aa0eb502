"""The types that every quantizer shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .registry import Registry

WIDTHS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 16})  # 32 bits means "no quantizer"

Target = Literal["weight", "activation"]
Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor: unsigned integer codes and what they stand for.

    value = scale * (codes - zero_point), or scale * codebook[codes] where there is a codebook.

    Attributes:
        codes: 0 .. num_levels - 1; uint8 up to 8 bits, int32 above. Any shape.
        scale: float32, positive, broadcastable to `codes`.
        bits: storage width of a code.
        num_levels: codes in use, at most 2**bits.
        zero_point: the code of value 0; a half-integer on a mid-rise grid.
        codebook: levels in units of `scale`, (L,) or (C, L); None on a uniform grid.
        channel_axis: axis of `codes` that has a scale of its own; None if one scale serves all.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    num_levels: int
    zero_point: float | Tensor = 0.0
    codebook: Tensor | None = None
    channel_axis: int | None = None

    def dequantize(self) -> Tensor:
        """The values, float32, in the shape of `codes`."""
        if self.codebook is None:
            values = self.codes.to(self.scale.dtype, copy=True)
            if isinstance(self.zero_point, Tensor) or self.zero_point != 0:
                values = values.sub_(self.zero_point)
            return values.mul_(self.scale)
        if self.codebook.dim() == 1:
            return self.scale * self.codebook[self.codes.long()]
        assert self.channel_axis is not None
        rows = self.codes.movedim(self.channel_axis, 0).flatten(1).long()  # (C, rest)
        values = self.codebook.gather(1, rows)
        moved = self.codes.movedim(self.channel_axis, 0).shape
        return self.scale * values.view(moved).movedim(0, self.channel_axis)

    def levels(self) -> Tensor:
        """What each code stands for, (groups, num_levels): one row for each scale."""
        scale = self.scale.reshape(-1, 1)
        if self.codebook is not None:
            return scale * self.codebook
        zero = self.zero_point
        zero = zero.reshape(-1, 1) if isinstance(zero, Tensor) else zero
        codes = torch.arange(self.num_levels, device=scale.device, dtype=scale.dtype)
        return scale * (codes - zero)


@dataclass(frozen=True)
class Site:
    """Where a quantizer stands: what the layer and the policy decide, not the method's options.

    Attributes:
        target: weights or activations.
        bits: width of a code.
        signed: whether values below zero occur (always so for weights).
        channels: size of the channel axis: O for weights (O, I, *kernel), C for activations.
        axis: where the channels of an activation stand: 1 (N, C, *), or -1 (*, C) before a
            linear layer. Those of a weight are always axis 0.
    """

    target: Target
    bits: int
    signed: bool
    channels: int
    axis: int = 1

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in a tensor of this site."""
        return 0 if self.target == "weight" else self.axis


class Quantizer(nn.Module, ABC):
    """Rounds a tensor to at most 2**bits levels, with a gradient for training.

    A subclass is final, takes a `Site` and then, after the `*`, the options that YAML may set.
    Parameters and buffers exist, with their final shapes, from construction on, so a state dict
    always loads strictly.

    Laws, tested for every registered quantizer: in eager float32
    `torch.equal(q(x), q.encode(x).dequantize())`; at most 2**bits codes per scale group; finite
    on zeros, a constant, an outlier; a gradient for every parameter.
    """

    targets: ClassVar[frozenset[Target]] = frozenset({"weight", "activation"})
    # of "nearest", "idempotent", "monotone": the laws that this method declares and is tested for;
    # an instance may declare fewer, where an option or a width breaks one
    declares: frozenset[str] = frozenset()
    # whether its parameters need the weights' decay, as nothing else makes them smaller
    decays: ClassVar[bool] = False
    # whether the ReLU in front is left out (`absorb_relus`); zero itself then gets no gradient,
    # as it gets none from a ReLU
    absorbs: bool = False

    def __init__(self, site: Site, *, per_channel: bool = False) -> None:
        super().__init__()
        if site.target not in self.targets:
            named = " and ".join(sorted(self.targets))
            raise ValueError(f"{type(self).__name__} quantizes {named} only; use lsq or uniq here")
        if site.bits not in WIDTHS:
            known = ", ".join(map(str, sorted(WIDTHS)))
            raise ValueError(f"no quantizer has {site.bits} bits; known widths: {known}")
        if per_channel and site.target == "activation":
            # one scale per input channel could not be taken out of a sum over input channels
            raise ValueError("per_channel is for weights; an activation has one scale")
        self.check(site)
        self.site = site
        self.bits = site.bits
        self.signed = site.signed
        self.channel_axis = site.channel_axis if per_channel else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Ranges and scales move with the model, but stay float32 when it changes its dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    @classmethod
    @abstractmethod
    def check(cls, site: Site) -> None:
        """Raises ValueError, naming the way out, where the method has no such width or target."""

    @classmethod
    def wraps(cls, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
        """The method inside and its options, for a method that runs another one; else None."""
        return None

    @abstractmethod
    def calibrate(self, x: Tensor, *, keep: Range | None = None) -> None:
        """Sets the scale from data, in place.

        Args:
            x: weights (O, I, *kernel), or a sample of activations of any shape.
            keep: the range (low, high) that another quantizer of the same tensor covered (a
                higher rung). The start that covers it is tried as well, and the one with the
                smaller mean squared error on `x` is kept: a step is never reused unchanged.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The quantized values, in the dtype and memory format of `x`, with a gradient."""

    @abstractmethod
    def encode(self, x: Tensor) -> QTensor:
        """The same values as codes, without a gradient."""

    @abstractmethod
    def range(self) -> Range:
        """Lowest and highest value that can be represented; float32, detached.

        Shape () or (channels,). Hand-over between widths and methods goes through this alone.
        """

    @property
    def clamps_at_zero(self) -> bool:
        """Whether a ReLU in front changes nothing: no value, and while it `absorbs` no gradient.

        Gradients are those of `x` and of all parameters, bit for bit; values so small that they
        are zero in units of the step may differ in theirs. State that follows the input, such as
        a moving range, may not depend on what lies below zero either.
        """
        return False

    def latent(self, x: Tensor) -> Tensor:
        """What rounding sees of `x`, on the scale of the output, with its gradient.

        `x` itself unless the method maps it first (DoReFa's tanh).
        """
        return x

    def learned_scale(self, x: Tensor, *, gradient: float | None = None) -> Tensor | None:
        """The scale with a gradient to its parameter; None where no scale is learned.

        Args:
            x: what is quantized; the scale comes back broadcastable to it.
            gradient: factor on the scale's gradient; None takes the method's own for `x`.
        """
        return None

    @property
    def encoding_constants(self) -> int:
        """How many float32 numbers `encode` needs beside what its `QTensor` holds.

        Learned thresholds or shifts: what a deployed network has to store as well.
        """
        return 0

    def at_progress(self, fraction: float) -> None:
        """Takes note of how far the stage is, 0 .. 1; called before each training step.

        Only for gradients that are annealed: what `encode` gives must not depend on it.
        """

    def after_step(self, weight: Tensor) -> None:
        """Mends the latent weight in place; called after each step of the optimizer."""


QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")
