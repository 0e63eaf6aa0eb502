"""Bin regularization: values are pulled to the level that they round to.

Source of all here: Han, Li, Liu, Tian and Shan, ICCV 2021, "Improving Low-Precision Network
Quantization via Bin Regularization"; for activations the public repositories that followed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import byte_pairs, world
from .core import QTensor, Quantizer
from .functional import by_stride, from_order
from .record import record
from .swap import input_quantizers, weight_layers


def bin_regularization(
    values: Tensor, q: QTensor, *, scale: Tensor | None = None, shared: bool = False
) -> Tensor:
    """Sum over the bins of the mean squared distance of a bin's values from its level.

    That is (mean - level)^2 + variance for each bin, the paper's two terms: empty bins add
    nothing and every other bin weighs the same. Values beyond the range belong to the outer bins.
    With a scale per channel, the mean over the channels.

    Args:
        values: what was rounded, on the scale of the levels (`Quantizer.latent`).
        q: the same values encoded; codes have the same shape.
        scale: `q.scale` with a gradient (`Quantizer.learned_scale`), where it is to get one.
        shared: the values come from a batch of which each process (`world`) has a part. Bins are
            then those of the whole batch, and the mean over the processes, each weighed by its
            images, is the loss of the whole batch; so are the gradients.

    Returns:
        Scalar, in squared units of `values`; 0 when every value sits on its level.

    Raises:
        ValueError: the shapes differ.

    Differs from the source in: nothing; computed in one pass, in closed form.
    """
    if values.shape != q.codes.shape:
        raise ValueError(f"values are {tuple(values.shape)}, codes {tuple(q.codes.shape)}")
    return _BinRegularization.apply([q], shared, values, scale)


def weight_bin_regularization(
    model: nn.Module, *, attach_scale: bool = True, grad_scale: float | None = None
) -> Tensor:
    """The sum of `bin_regularization` over all quantized weights of `model`.

    Args:
        model: with `QuantLayer`s.
        attach_scale: whether learned steps get a gradient too.
        grad_scale: factor on that gradient; None takes the factor of the quantizer's own
            gradient. With 1.0 it can exceed the task's by a factor of 1000.
    """
    qs, values, scales = [], [], []
    for layer in weight_layers(model).values():
        quantizer, weight = layer.weight_quantizer, layer.weight
        assert quantizer is not None
        qs.append(quantizer.encode(weight))
        values.append(quantizer.latent(weight))
        scales.append(_scale(quantizer, weight, attach_scale, grad_scale))
    if not qs:
        return torch.zeros((), device=next(model.parameters()).device)
    # all at once: layers are small, and most of the time of an operation on one is its call
    return _BinRegularization.apply(qs, False, *values, *scales)


def activation_bin_regularization(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    attach_scale: bool = False,
    grad_scale: float | None = None,
) -> Tensor:
    """The sum of `bin_regularization` over the inputs that `collect_inputs` gathered.

    Args: see `weight_bin_regularization`; steps get no gradient unless asked for.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for name, x in inputs.items():
        quantizer = model.get_submodule(name.partition("#")[0])
        assert isinstance(quantizer, Quantizer)
        q, scale = quantizer.encode(x), _scale(quantizer, x, attach_scale, grad_scale)
        total = total + bin_regularization(quantizer.latent(x), q, scale=scale, shared=True)
    return total


@contextmanager
def collect_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gathers what each input quantizer is about to round, with its gradient, while open.

    The dictionary, quantizer name -> tensor, is emptied as each forward pass of `model` begins:
    it holds one activation map a layer. A quantizer that runs twice in a pass comes as `name` and
    `name#2`. Nothing is gathered where gradients are off.
    """
    with record(model, input_quantizers(model), attached=True) as gathered:
        try:
            yield gathered
        finally:
            gathered.clear()


def _scale(quantizer: Quantizer, x: Tensor, attach: bool, gradient: float | None) -> Tensor | None:
    return quantizer.learned_scale(x, gradient=gradient) if attach else None


class _BinRegularization(torch.autograd.Function):
    """Loss = sum of (v - level)^2 / members of the bin, so both gradients fall out of one pass.

    Of several tensors it is the sum of their losses; their values stand behind one another then.
    """

    @staticmethod
    def forward(ctx: Any, qs: Sequence[QTensor], shared: bool, *tensors: Tensor | None) -> Tensor:
        values, scales = cast(Sequence[Tensor], tensors[: len(qs)]), tensors[len(qs) :]
        places = [_Place.of(v, q) for v, q in zip(values, qs, strict=True)]
        level = _joined([q.dequantize() for q in qs], places)
        learned = any(scale is not None for scale in scales)
        flat = _joined(values, places)
        # written over where nobody needs the levels again: activations are large
        distance = level.clone() if learned else level
        distance = distance.to(torch.promote_types(level.dtype, flat.dtype)).sub_(flat)
        pull = _shares(qs, places, shared=shared).to(distance.dtype).mul_(distance)
        grad_scales: list[Tensor | None] = [None] * len(qs)
        if learned:
            for number, own in enumerate(_split(pull * level, places)):
                if (scale := scales[number]) is not None:
                    total = own.view(places[number].groups, -1).sum(1).view(scale.shape)
                    grad_scales[number] = 2 * total / qs[number].scale.view(scale.shape)
        ctx.places = places
        ctx.save_for_backward(pull, *grad_scales)
        return torch.dot(distance, pull)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pull, *grad_scales = ctx.saved_tensors
        grad_values = [
            from_order(part, place.shape, place.order).to(place.dtype)
            for part, place in zip(_split(pull * (-2 * grad), ctx.places), ctx.places, strict=True)
        ]
        return None, None, *grad_values, *(None if g is None else g * grad for g in grad_scales)


class _Place(NamedTuple):
    """How a tensor stands among others: flat, its axes in this order, its scale groups together."""

    shape: torch.Size
    dtype: torch.dtype
    order: list[int]
    groups: int
    levels: int

    @classmethod
    def of(cls, x: Tensor, q: QTensor) -> _Place:
        order = by_stride(x)
        groups = 1
        if q.channel_axis is not None:
            order.sort(key=lambda axis: axis != q.channel_axis)
            groups = x.shape[q.channel_axis]
        return cls(x.shape, x.dtype, order, groups, q.num_levels)


def _joined(tensors: Sequence[Tensor], places: Sequence[_Place]) -> Tensor:
    pairs = zip(tensors, places, strict=True)
    flat = [x.permute(place.order).reshape(-1) for x, place in pairs]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _split(flat: Tensor, places: Sequence[_Place]) -> Sequence[Tensor]:
    return flat.split([place.shape.numel() for place in places])


def _shares(qs: Sequence[QTensor], places: Sequence[_Place], *, shared: bool) -> Tensor:
    """Of each value 1 / (members of its bin * scale groups), float32, as `_joined` puts them."""
    bins = _joined([q.codes for q in qs], places)
    rows = [
        (place.shape.numel() // place.groups, place.levels, place.groups)
        for place in places
        for _ in range(place.groups)
    ]
    number = sum(levels for _, levels, _ in rows)
    groups: Tensor | int = 1
    if len(rows) > 1:  # the bins of each scale group are numbered behind those before it
        sizes, levels, counts = torch.tensor(rows, device=bins.device).unbind(1)
        first = (levels.cumsum(0) - levels).int()
        bins = bins.int().add_(first.repeat_interleave(sizes, output_size=len(bins)))
        groups = counts.repeat_interleave(levels, output_size=number)
    paired = byte_pairs.can_pair(bins, number)
    bins = byte_pairs.paired(bins) if paired else bins.int()
    members = byte_pairs.count(bins, number) if paired else bins.bincount(minlength=number)
    weight = 1.0
    if shared:
        members, weight = world.summed(members), world.ratio()
    shares = weight / (members.clamp_min(1) * groups)
    return byte_pairs.look_up(shares, bins) if paired else shares.index_select(0, bins)
