"""What was quantized at which width, and what was left in float and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from .policy import LayerPlan
from .probing import Probe
from .swap import quant_layers, unquantized

COLUMNS = ("layer", "kind", "weight", "input", "note")


def describe(model: nn.Module, found: Probe | None = None) -> list[dict[str, Any]]:
    """A row for each quantized layer in the order of the model, then one for all that is left.

    Keys: layer; kind; weight_bits, activation_bits, 32 in float; weight_quantizer and
    activation_quantizer, registered names or None; note: why it is in float, or where a shared
    layer is used again.

    Args:
        model: after `quantize_model`.
        found: the probe of the float model, for the reasons that only running it shows.
    """
    rows = [
        _row(name, type(layer.layer).__name__, layer.plan or LayerPlan(), _note(name, found))
        for name, layer in quant_layers(model).items()
    ]
    done = {row["layer"]: row for row in rows}
    for name, why in unquantized(model, found).items():
        kind, _, reason = why.partition(": ")
        if name in done:
            done[name]["note"] = reason
        else:
            rows.append(_row(name, kind, LayerPlan(), reason))
    return rows


def describe_text(model: nn.Module, found: Probe | None = None) -> str:
    """The rows of `describe` as a table of plain text."""
    lines = [COLUMNS]
    for row in describe(model, found):
        halves = [
            f"{row[f'{half}_bits']} {method}" if (method := row[f"{half}_quantizer"]) else "float"
            for half in ("weight", "activation")
        ]
        lines.append((row["layer"] or "(the model)", row["kind"], *halves, row["note"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _row(name: str, kind: str, plan: LayerPlan, note: str) -> dict[str, Any]:
    return {
        "layer": name,
        "kind": kind,
        "weight_bits": plan.weight_bits,
        "activation_bits": plan.activation_bits,
        "weight_quantizer": plan.weight[0].name if plan.weight else None,
        "activation_quantizer": plan.activation[0].name if plan.activation else None,
        "note": note,
    }


def _note(name: str, found: Probe | None) -> str:
    """Where a layer that stands at several places stands."""
    facts = found.layers.get(name) if found else None
    if facts is None:
        return ""
    notes = [f"also {', '.join(facts.aliases)}"] if facts.aliases else []
    notes += [f"runs {facts.calls} times"] if facts.calls > 1 else []
    return "; ".join(notes)
