"""Weights that oscillate between two levels: measured, dampened by a loss, or frozen.

The straight-through gradient drives a latent weight that sits near a threshold back and forth
across it. Its level then says little, and the running statistics of batch norm are of a network
that no longer exists.

Source of all here: Nagel, Fournarakis, Bondarenko and Blankevoort, ICML 2022, arXiv:2203.11086,
"Overcoming Oscillations in Quantization-Aware Training", and its public code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .core import QTensor, Quantizer
from .functional import wide
from .layers import QuantLayer
from .swap import weight_layers

Aggregation = Literal["sum", "mean", "kernel_mean"]
FreezeTo = Literal["mean", "last"]

OSCILLATING = 0.005  # the paper's bound on the frequency of a weight that counts as oscillating
TRIES = 40  # steps of the search for a bin: wide ones take about five, the narrowest twenty
ROUNDS = 3  # searches, each without the weights that the one before it could not place


def dampening(
    values: Tensor, q: QTensor, *, scale: Tensor | None = None, aggregation: Aggregation = "sum"
) -> Tensor:
    """Squared distance of the values within the range from the levels that they round to.

    Every value weighs the same, whereas in bin regularization every bin does. Values beyond the
    range get no gradient: they count as lying on its end, which may move the scale.

    Args:
        values: what was rounded, on the scale of the levels (`Quantizer.latent`), (O, *).
        q: the same values encoded; codes have the same shape.
        scale: `q.scale` with a gradient (`Quantizer.learned_scale`), where it is to get one.
        aggregation: the "sum" over all, their "mean", or the sum over O of the mean over the
            rest ("kernel_mean").

    Returns:
        Scalar, in squared units of `values`.

    Raises:
        ValueError: the shapes differ.

    Source: the paper's oscillation dampening. Differs from the code in: nothing.
    """
    if values.shape != q.codes.shape:
        raise ValueError(f"values are {tuple(values.shape)}, codes {tuple(q.codes.shape)}")
    scale = q.scale if scale is None else scale
    low, high = _ends(q)
    within = wide(values).clamp(scale * low, scale * high)
    loss = (q.dequantize() - within).square()
    if aggregation == "mean":
        return loss.mean()
    return loss.sum() * (len(loss) / loss.numel() if aggregation == "kernel_mean" else 1.0)


def weight_dampening(model: nn.Module, *, aggregation: Aggregation = "sum") -> Tensor:
    """The sum of `dampening` over all quantized weights of `model`.

    A learned scale gets the loss's own gradient, without the method's gradient factor.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    for layer in weight_layers(model).values():
        quantizer, weight = layer.weight_quantizer, layer.weight
        assert quantizer is not None
        total = total + dampening(
            quantizer.latent(weight),
            quantizer.encode(weight),
            scale=quantizer.learned_scale(weight, gradient=1.0),
            aggregation=aggregation,
        )
    return total


@dataclass(frozen=True)
class Oscillation:
    """How each weight has moved between its codes; tensors of one shape.

    Attributes:
        codes: the last ones, any type of number.
        direction: of the last change, int8: +1 down, -1 up, 0 before the first.
        frequency: moving average of `oscillates`, float32.
        count: how often it has oscillated, int32.
        mean_code: moving average of the codes, float32.
        frozen: whether it is frozen, bool.
        frozen_codes: the code that it is frozen to.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    count: Tensor
    mean_code: Tensor
    frozen: Tensor
    frozen_codes: Tensor

    @classmethod
    def start(cls, codes: Tensor) -> Oscillation:
        """What is known from one look: nothing has moved."""
        return cls(
            codes=codes,
            direction=torch.zeros_like(codes, dtype=torch.int8),
            frequency=torch.zeros_like(codes, dtype=torch.float32),
            count=torch.zeros_like(codes, dtype=torch.int32),
            mean_code=codes.float(),
            frozen=torch.zeros_like(codes, dtype=torch.bool),
            frozen_codes=torch.zeros_like(codes),
        )


def follow(
    state: Oscillation,
    codes: Tensor,
    *,
    momentum: float,
    threshold: float | None = None,
    freeze_to: FreezeTo = "mean",
) -> Oscillation:
    """The state after one more look at the codes.

    A weight oscillates when its code changes in the direction opposite to that of its last
    change. One that does so too often is frozen, from the next look on.

    Args:
        codes: as they are now; those of frozen weights are not read.
        momentum: weight of this look in the moving averages.
        threshold: a weight with a frequency above it is frozen; None freezes none.
        freeze_to: the rounded moving average of the weight's codes ("mean"), or the code of this
            look ("last").

    Source: the paper's iterative weight freezing. Differs from the code in: a frozen weight that
    is still above the threshold is not frozen anew, to what its average has become.
    """
    codes = torch.where(state.frozen, state.frozen_codes, codes)
    direction = (codes < state.codes).to(torch.int8) - (codes > state.codes).to(torch.int8)
    oscillates = direction * state.direction == -1
    frequency = torch.lerp(state.frequency, oscillates.float(), momentum)
    frozen, frozen_codes = state.frozen, state.frozen_codes
    if threshold is not None:
        often = (frequency > threshold) & ~state.frozen
        target = state.mean_code.round().to(codes.dtype) if freeze_to == "mean" else codes
        frozen, frozen_codes = frozen | often, torch.where(often, target, frozen_codes)
    return Oscillation(
        codes=codes,
        direction=torch.where(direction == 0, state.direction, direction),
        frequency=frequency,
        count=state.count + oscillates,
        mean_code=torch.lerp(state.mean_code, codes.float(), momentum),
        frozen=frozen,
        frozen_codes=frozen_codes,
    )


_FIELDS = tuple(field.name for field in fields(Oscillation))


@dataclass(frozen=True)
class OscillationShares:
    """Of some weights, the shares that oscillate and that are frozen; no weight does both."""

    oscillating: float
    frozen: float


class OscillationTracker(nn.Module):
    """Follows the codes of all weights of a model at up to `max_bits`, and freezes on demand.

    Buffers hold the `Oscillation` of all layers end to end: it is part of a checkpoint and not of
    the model. A frozen weight is held by its latent weight, which is moved whenever it would
    encode to another code. So evaluation, export and a child stage see it frozen without knowing.
    One that cannot be held, because the method ties it to its neighbours, is let go.

    Source: see `follow`. Differs from it in: codes are looked at after an optimizer step and not
    in the forward pass, so that a weight is constant from the very next pass on, one earlier.

    Args:
        model: with `QuantLayer`s whose weights are calibrated, or will be loaded together with
            these buffers.
        max_bits: wider weights are left alone.
        momentum, freeze_to: see `follow`.
    """

    frequency: Tensor
    frozen: Tensor
    frozen_codes: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        max_bits: int = 4,
        momentum: float = 0.001,
        freeze_to: FreezeTo = "mean",
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.freeze_to = freeze_to
        self._layers = followed_layers(model, max_bits=max_bits)  # a dictionary registers nothing
        if not self._layers:
            raise ValueError(f"no weight of the model is quantized to {max_bits} bits or fewer")
        start = Oscillation.start(self._codes())
        for name in _FIELDS:
            self.register_buffer(name, getattr(start, name))

    @property
    def state(self) -> Oscillation:
        """Of all weights, in the order of the layers, (weights,)."""
        return Oscillation(**{name: getattr(self, name) for name in _FIELDS})

    @torch.no_grad()
    def update(self, threshold: float | None = None) -> None:
        """Looks at the codes after an optimizer step, and puts frozen weights back in place.

        Args:
            threshold: see `follow`. With None no weight is touched, not even a frozen one.
        """
        state = follow(
            self.state,
            self._codes(),
            momentum=self.momentum,
            threshold=threshold,
            freeze_to=self.freeze_to,
        )
        for name in _FIELDS:
            setattr(self, name, getattr(state, name))
        if threshold is not None:
            self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Puts frozen weights that have left their codes back; those that cannot be, it lets go."""
        codes = self._split(self.frozen_codes)
        for name, frozen in self._split(self.frozen).items():
            layer, quantizer = self._layers[name]
            lost = move_to_codes(quantizer, layer.weight, codes[name], where=frozen)
            frozen.logical_and_(~lost)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Inside, the value of a frozen weight is scale * constant, for the gradient too.

        Its gradient goes to a learned scale alone, but for methods whose statistics pass one on
        (weight normalization, XNOR's scale): what these move, `update` puts back. Values do not
        change.
        """
        frozen = self._split(self.frozen)
        hooks = [
            quantizer.register_forward_hook(_held(frozen[name]))
            for name, (_, quantizer) in self._layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def shares(self, *, above: float = OSCILLATING) -> OscillationShares:
        """Of all weights that are followed; `above` is the frequency that counts."""
        return _shares(self.frequency, self.frozen, above)

    def layer_shares(self, *, above: float = OSCILLATING) -> dict[str, OscillationShares]:
        """The shares of each layer by name."""
        frozen = self._split(self.frozen)
        return {
            name: _shares(frequency, frozen[name], above)
            for name, frequency in self._split(self.frequency).items()
        }

    def _codes(self) -> Tensor:
        """As the weights encode now, end to end."""
        encoded = [q.encode(layer.weight).codes for layer, q in self._layers.values()]
        return torch.cat([codes.flatten() for codes in encoded])

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        """A buffer by layer, each part a view in the shape of the layer's weight."""
        shapes = [layer.weight.shape for layer, _ in self._layers.values()]
        parts = flat.split([shape.numel() for shape in shapes])
        return {
            name: part.view(shape)
            for name, part, shape in zip(self._layers, parts, shapes, strict=True)
        }


def followed_layers(model: nn.Module, *, max_bits: int) -> dict[str, tuple[QuantLayer, Quantizer]]:
    """The layers with weights of at most `max_bits`, and their weight quantizers, by name."""
    return {
        name: (layer, layer.weight_quantizer)
        for name, layer in weight_layers(model).items()
        if layer.weight_quantizer is not None and layer.weight_quantizer.bits <= max_bits
    }


@torch.no_grad()
def move_to_codes(quantizer: Quantizer, weight: Tensor, codes: Tensor, *, where: Tensor) -> Tensor:
    """Changes weights, in place, so that they encode to `codes`; those that do already stay.

    A weight goes onto the level itself. Where that is not in the bin, as with a method that maps
    weights before it rounds, it walks into the bin: half again as far at each step, half as far
    after each turn. That needs no inverse of the method, only that codes rise with the weight,
    and bears that the weights of a layer shift each other (normalization). One that fits nowhere
    (a centred filter is never all negative) stays where it was.

    Args:
        weight: as the quantizer is given it.
        codes: read where `where` is set.

    Returns:
        Which of the weights asked for have another code in the end; bool.
    """
    before, held = weight.clone(), where
    for _ in range(ROUNDS):
        wrong = _walk(quantizer, weight, codes, held)
        if not wrong.any():
            break
        weight.copy_(before)
        held = held & ~wrong
    if held is where:  # nearly always
        return wrong
    return where & (quantizer.encode(weight).codes != codes)


def _walk(quantizer: Quantizer, weight: Tensor, codes: Tensor, where: Tensor) -> Tensor:
    """Moves weights into the bins of their codes, in place; gives those that are not in theirs."""
    q = quantizer.encode(weight)
    wrong = where & (q.codes != codes)
    if not wrong.any():
        return wrong
    level = replace(q, codes=codes).dequantize().to(weight.dtype)
    spread = weight.abs().amax()
    step, last = (spread / 16).expand_as(weight), torch.zeros_like(weight)
    weight.copy_(torch.where(wrong, level, weight))
    for _ in range(TRIES):
        q = quantizer.encode(weight)
        wrong = where & (q.codes != codes)
        if not wrong.any():
            break
        towards = (codes.float() - q.codes).sign() * wrong
        turn = towards * last  # 1 straight on, -1 back
        step = step * torch.where(turn > 0, 1.5, torch.where(turn < 0, 0.5, 1.0))
        weight.add_(towards * step)
        last = towards
    return wrong


def _held(frozen: Tensor) -> Callable[..., Tensor]:
    """A forward hook of a quantizer that makes frozen weights constants."""

    def hook(quantizer: Quantizer, args: tuple[Any, ...], y: Tensor) -> Tensor:
        constant = y.detach()
        scale = quantizer.learned_scale(args[0])
        if scale is not None:  # times exactly 1, with the gradient of the scale
            constant = (constant * (scale / scale.detach())).to(y.dtype)
        return torch.where(frozen, constant, y)

    return hook


def _shares(frequency: Tensor, frozen: Tensor, above: float) -> OscillationShares:
    oscillating = (frequency > above) & ~frozen
    return OscillationShares(float(oscillating.float().mean()), float(frozen.float().mean()))


def _ends(q: QTensor) -> tuple[float | Tensor, float | Tensor]:
    """Lowest and highest level in units of the scale, in a shape that goes with the codes."""
    if q.codebook is None:
        return 0.0 - q.zero_point, q.num_levels - 1 - q.zero_point
    low, high = q.codebook.amin(-1), q.codebook.amax(-1)
    if q.codebook.dim() == 1:
        return low, high
    shape = [-1 if axis == q.channel_axis else 1 for axis in range(q.codes.dim())]
    return low.view(shape), high.view(shape)
