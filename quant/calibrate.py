"""Setting ranges from data, handing them over, and making a frozen copy of the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .core import Range
from .layers import QuantLayer, turned
from .probing import call, evaluating, inputs_of
from .record import record
from .swap import quant_layers, quantizers, weight_layers

VALUES_PER_BATCH = 2**15  # of each quantizer's input
VALUES = 2**18  # in all: 1 MiB a quantizer


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, keep: Mapping[str, Range] | None = None
) -> None:
    """Sets every quantizer of `model`, in place: weights from the tensors, inputs from batches.

    Inputs are collected with quantized weights and with all input quantizers bypassed, so that
    the order of the layers does not matter. Dropout is off. Batch norm normalizes each batch by
    its own statistics, as it will in training, and its running averages stay: after a change of
    width these are stale, and a range read off them would be too.

    Args:
        model: with `QuantLayer`s.
        batches: inputs (N, ...), tuples that begin with them, or mappings of keyword arguments;
            always the same ones, in the same order, where the result must repeat.
        keep: ranges of other quantizers by quantizer name (from `ranges`), each tried as a start.

    Raises:
        ValueError: an input is to be quantized and there is no batch, or a quantized layer did
            not run: the model would go on with the layer in float.
    """
    keep = keep or {}
    for name, layer in weight_layers(model).items():
        assert layer.weight_quantizer is not None
        known = keep.get(_join(name, "weight_quantizer"))
        layer.weight_quantizer.calibrate(layer.weight.detach(), keep=known)
    inputs = iter(batches)
    first = next(inputs, None)
    layers = quant_layers(model)
    if first is None and all(layer.input_quantizer is None for layer in layers.values()):
        return
    samples = collect_samples(model, [] if first is None else chain([first], inputs))
    for name, layer in layers.items():
        if name not in samples:
            raise ValueError(
                f"layer {name!r} did not run on the calibration batches, or runs as the float "
                "layer: the model must call it by its attribute, not by a reference kept elsewhere"
            )
        if layer.input_quantizer is not None:
            known = keep.get(_join(name, "input_quantizer"))
            layer.input_quantizer.calibrate(samples[name], keep=known)


def collect_samples(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """A bounded sample of each quantized layer's unquantized input, float32, by layer name.

    Layers whose input stays in float have one as well: it tells that they ran. Positions are
    drawn with a fixed seed; smallest and largest value of every batch are in it.
    """
    kept: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def sample(name: str, x: Tensor) -> None:
        values = kept.setdefault(name, [])
        flat = x.reshape(-1)
        room = min(VALUES_PER_BATCH, VALUES - sum(len(v) for v in values))
        if room < len(flat):
            places = torch.randint(len(flat), (max(room, 0),), generator=generator)
            flat = torch.cat([torch.stack(flat.aminmax()), flat[places.to(flat.device)]])
        values.append(flat.float())

    layers = quant_layers(model)
    count = 0
    with ExitStack() as stack:
        stack.enter_context(record(model, layers, reduce=sample))
        stack.enter_context(evaluating(model))
        stack.enter_context(_bypassed(layers))
        stack.enter_context(_batch_statistics(model))
        stack.enter_context(torch.no_grad())
        for x in inputs_of(batches, model):
            call(model, x)
            count += 1
    if count == 0:
        raise ValueError("calibration of the inputs needs at least one batch")
    return {name: torch.cat(values) for name, values in kept.items()}


def ranges(model: nn.Module) -> dict[str, Range]:
    """The range of every quantizer by name, for `calibrate(..., keep=)` on another width."""
    return {name: quantizer.range() for name, quantizer in quantizers(model).items()}


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replaces the running statistics of batch norm by the plain average over `batches`, in place.

    Everything else runs as in evaluation. A model without batch norm is not run at all.

    Raises:
        ValueError: no batch; the statistics are then as before.
    """
    norms = _batch_norms(model)
    if not norms:
        return
    inputs = inputs_of(batches, model)
    first = next(inputs, None)
    if first is None:
        raise ValueError("re-estimating batch norm needs at least one batch")
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.training = True
            for x in chain([first], inputs):
                call(model, x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Freezes a quantized model in place: the same outputs, bit for bit, for less work.

    Weights become what their quantizer made of them and the weight quantizers go, as do latent
    weights; all is in evaluation mode and needs no gradient. For a teacher.
    """
    model.eval()
    baked: dict[nn.Parameter, nn.Parameter] = {}  # a weight that layers share stays one
    for layer in quant_layers(model).values():
        if layer.weight_quantizer is not None:
            if (latent := layer.latent) not in baked:
                weight = turned(layer.layer, layer.weight_quantizer(layer.weight))
                baked[latent] = nn.Parameter(weight, requires_grad=False)
            layer.layer.weight = baked[latent]
            layer.weight_quantizer = None
    return model.requires_grad_(False)


@contextmanager
def _bypassed(layers: Mapping[str, QuantLayer]) -> Iterator[None]:
    """No input quantizer inside; afterwards as before."""
    held = {name: layer.input_quantizer for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.input_quantizer = None
        yield
    finally:
        for name, layer in layers.items():
            layer.input_quantizer = held[name]


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm uses the statistics of the batch, and its running averages do not move."""
    norms = _batch_norms(model)
    for norm in norms:
        norm.track_running_stats = False
    held = [(norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None
        yield
    finally:
        for norm, (mean, var) in zip(norms, held, strict=True):
            norm.running_mean, norm.running_var = mean, var
            norm.track_running_stats = True


def _batch_norms(model: nn.Module) -> list[Any]:
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]


def _join(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part
