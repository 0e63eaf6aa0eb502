"""Bin regularization: values are pulled to the level that they round to.

Source of all here: Han, Li, Liu, Tian and Shan, ICCV 2021, "Improving Low-Precision Network
Quantization via Bin Regularization"; for activations the public repositories that followed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import byte_pairs, world
from .core import QTensor, Quantizer
from .functional import from_stored_order, look_up, stored_order, wide
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
    return _BinRegularization.apply(values, scale, q, shared)


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
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for layer in weight_layers(model).values():
        assert layer.weight_quantizer is not None
        total = total + _pull(layer.weight_quantizer, layer.weight, attach_scale, grad_scale)
    return total


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
        total = total + _pull(quantizer, x, attach_scale, grad_scale, shared=True)
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


def _pull(
    quantizer: Quantizer, x: Tensor, attach: bool, gradient: float | None, *, shared: bool = False
) -> Tensor:
    scale = quantizer.learned_scale(x, gradient=gradient) if attach else None
    return bin_regularization(quantizer.latent(x), quantizer.encode(x), scale=scale, shared=shared)


class _BinRegularization(torch.autograd.Function):
    """Loss = sum of (v - level)^2 / members of the bin, so both gradients fall out of one pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor | None, q: QTensor, shared: bool) -> Tensor:
        level = q.dequantize()
        distance = wide(values) - level
        pull = _share(q, shared).to(distance.dtype).mul_(distance)
        ctx.values_dtype = values.dtype
        grad_scale = None
        if scale is not None:
            grad_scale = -2 * _sum_to(pull * level, q) / q.scale
            grad_scale = grad_scale.view(scale.shape)
        ctx.save_for_backward(pull, grad_scale)
        return torch.dot(stored_order(distance, pull), stored_order(pull, pull))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pull, grad_scale = ctx.saved_tensors
        grad_values = (pull * (2 * grad)).to(ctx.values_dtype)
        return grad_values, None if grad_scale is None else grad_scale * grad, None, None


def _share(q: QTensor, shared: bool) -> Tensor:
    """Of each value 1 / (members of its bin * scale groups), shaped as the codes."""
    bins, groups = q.codes, 1
    if q.channel_axis is not None:
        groups = bins.shape[q.channel_axis]
        shape = [1] * bins.dim()
        shape[q.channel_axis] = groups
        first = torch.arange(groups, device=bins.device, dtype=torch.int32) * q.num_levels
        bins = bins + first.view(shape)
    number = groups * q.num_levels
    stored = stored_order(bins, bins)
    paired = byte_pairs.can_pair(stored, number)
    members = byte_pairs.count(stored, number) if paired else stored.bincount(minlength=number)
    part = 1.0
    if shared:
        members, part = world.summed(members), world.ratio()
    shares = part / (members.clamp_min(1) * groups)
    if paired:
        return from_stored_order(byte_pairs.look_up(shares, stored), bins)
    return look_up(shares, bins.int())


def _sum_to(x: Tensor, q: QTensor) -> Tensor:
    """The sum over each scale group, in the shape of the scale."""
    if q.channel_axis is None:
        return x.sum().view_as(q.scale)
    return x.movedim(q.channel_axis, 0).flatten(1).sum(1).view_as(q.scale)
