"""What a quantizer does to its tensor, drawn: histograms, levels, staircase; as JSON values.

Everything lies on one axis whatever the scales are: of weights what rounding sees
(`Quantizer.latent`), of activations the values themselves, each divided by the scale of its group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .core import QTensor, Quantizer
from .layers import QUANTIZABLE, QuantLayer
from .metrics import Seen
from .policy import LayerPlan
from .probing import call, evaluating, inputs_of
from .record import record
from .swap import quant_layers

BINS = 64
MOST_LEVELS = 256  # of more, neighbours are drawn as one
SAMPLE = 2**16  # values of each quantizer's input in all
PER_BATCH = 2**14
OUTSIDE = 5e-4  # share of the values beyond either end of the span
EMPTY = dict.fromkeys(
    ("quantizer", "scale", "low", "high", "levels_used", "clipped", "sqnr_db", "effectiveness")
)
View = dict[str, Any]


@torch.no_grad()
def layer_views(model: nn.Module, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """A row for each layer with a weight, in the order of the model, in evaluation mode.

    Keys: layer; weight and activation, each a view or None. A view has the JSON values: bits,
    quantizer, scale (the largest), low, high, levels_used, clipped, sqnr_db, effectiveness; and in
    units of the scale: span (two ends), before (how many values in each of equal bins of the span,
    the outer ones with what lies beyond), levels, after (the share of values on each), stairs (the
    corners, x and y, of the steps from values to levels, as far as there are values). Weights in
    float have bits 32, span and before, in units of their deviation; inputs in float are None.

    Args:
        batches: inputs of the model; numbers are of all of them, histograms of a seeded sample.
    """
    layers = quant_layers(model)
    watched = {
        name: _Watched(layer.input_quantizer)
        for name, layer in layers.items()
        if layer.input_quantizer is not None
    }
    if watched:

        def look(name: str, x: Tensor) -> None:
            watched[name].add(x)

        with evaluating(model), record(model, watched, reduce=look):
            for inputs in inputs_of(batches, model):
                call(model, inputs)
    inside = {layer.layer for layer in layers.values()}
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            plan = module.plan or LayerPlan()
            weight, seen = _weight(module, plan), watched.get(name)
            activation = (
                seen.view(plan.activation[0].name if plan.activation else None) if seen else None
            )
            rows.append({"layer": name, "weight": weight, "activation": activation})
        elif isinstance(module, QUANTIZABLE) and module not in inside:
            rows.append({"layer": name, "weight": _float(module.weight), "activation": None})
    return rows


class _Watched:
    """An input quantizer at work: all that it was given in sums, and a sample of it."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.seen = Seen(quantizer)
        self.values: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.last: QTensor | None = None
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        q = self.seen.add(x)
        self.last = q
        room = min(PER_BATCH, SAMPLE - sum(len(values) for values in self.values))
        if room > 0:
            values, codes = (x.float() / q.scale).reshape(-1), q.codes.reshape(-1)
            if room < len(values):
                places = torch.randint(len(values), (room,), generator=self._generator)
                places = places.to(values.device)
                values, codes = values[places], codes[places]
            self.values.append(values)
            self.codes.append(codes)

    def view(self, name: str | None) -> View | None:
        if self.last is None:
            return None  # the layer did not run
        return _view(self.seen, name, torch.cat(self.values), torch.cat(self.codes), self.last)


def _weight(layer: QuantLayer, plan: LayerPlan) -> View:
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return _float(layer.latent)
    seen = Seen(quantizer)
    q = seen.add(layer.weight)
    values = quantizer.latent(layer.weight).float() / q.scale
    return _view(
        seen,
        plan.weight[0].name if plan.weight else None,
        values.reshape(-1),
        q.codes.reshape(-1),
        q,
    )


def _view(seen: Seen, name: str | None, values: Tensor, codes: Tensor, q: QTensor) -> View:
    # (L,), of codebooks per channel the mean
    levels = (q.levels() / q.scale.reshape(-1, 1)).mean(0)
    counts = torch.bincount(codes.int(), minlength=len(levels))
    if len(levels) > MOST_LEVELS:
        levels = torch.stack([part.mean() for part in levels.tensor_split(MOST_LEVELS)])
        counts = torch.stack([part.sum() for part in counts.tensor_split(MOST_LEVELS)])
    ordered = values.sort().values
    half = float(levels.max() - levels.min()) / max(len(levels) - 1, 1) / 2
    low, high = _ends(ordered)
    span = min(low, float(levels.min()) - half), max(high, float(levels.max()) + half)
    summary = seen.summary()
    return {
        "bits": seen.quantizer.bits,
        "quantizer": name,
        "scale": _short(summary["scale"]),
        "low": _short(summary["low"]),
        "high": _short(summary["high"]),
        "levels_used": seen.levels,
        "clipped": _short(summary["clipped"]),
        "sqnr_db": _short(summary["sqnr_db"]),
        "effectiveness": _short(seen.effectiveness),
        **_histogram(ordered, span),
        "levels": _shorts(levels),
        "after": _shorts(counts / counts.sum()),
        "stairs": _stairs(ordered, levels, counts, span),
    }


def _float(weight: Tensor) -> View:
    values = weight.detach().float().reshape(-1)
    ordered = (values / values.std(correction=0).clamp_min(1e-30)).sort().values
    low, high = _ends(ordered)
    span = (low, high) if low < high else (low - 1, high + 1)
    nothing = {"levels": None, "after": None, "stairs": None}
    return {"bits": 32, **EMPTY, **_histogram(ordered, span), **nothing}


def _ends(ordered: Tensor) -> tuple[float, float]:
    """Between which lie all values but a few."""
    last = len(ordered) - 1
    first = math.floor(OUTSIDE * last)
    return float(ordered[first]), float(ordered[last - first])


def _histogram(values: Tensor, span: tuple[float, float]) -> dict[str, Any]:
    low, high = span
    places = ((values - low) * (BINS / (high - low))).int().clamp_(0, BINS - 1)
    counts = torch.bincount(places, minlength=BINS)
    return {"span": [_short(low), _short(high)], "before": counts.tolist()}


def _stairs(
    ordered: Tensor, levels: Tensor, counts: Tensor, span: tuple[float, float]
) -> list[list[float]]:
    """The corners of the rising steps that put as many values on each level as there are.

    Where every value of one size has the same level, as with most methods, these are the steps.
    """
    used = counts.nonzero()[:, 0]
    used = used[levels[used].argsort()]
    y = levels[used]
    above = counts[used].cumsum(0)[:-1]  # of each step the first value behind it
    x = (ordered[above - 1] + ordered[above]) / 2
    ends = x.new_tensor(span)
    x = torch.cat([ends[:1], x.clamp(*span).repeat_interleave(2), ends[1:]])
    return [_shorts(x), _shorts(y.repeat_interleave(2))]


def _short(value: float) -> float | None:
    """Five digits are enough to draw; JSON has no infinity (an SQNR without noise)."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _shorts(values: Tensor) -> list[Any]:
    return [_short(value) for value in values.tolist()]
