"""Turning a float model into a quantized one, and reading it back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .core import Quantizer
from .layers import QuantLayer
from .policy import LayerPlan, QuantPolicy
from .probing import NORMS, Probe, probe

log = logging.getLogger(__name__)

__all__ = [
    "Probe",
    "apply_plan",
    "float_state_dict",
    "layer_plan",
    "probe",
    "quant_layers",
    "quantize_model",
    "quantizer_parameters",
    "quantizers",
    "unquantized",
]


def quantize_model(
    model: nn.Module,
    policy: QuantPolicy,
    found: Probe | None = None,
    *,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Swaps the layers that the policy quantizes for `QuantLayer`s, in place.

    The quantizers still have to be calibrated. What has weights and stays in float is logged and
    listed by `unquantized`.

    Args:
        model: float model.
        policy: widths and methods.
        found: what `probe` found; or give `batches` to probe with.

    Returns:
        The model; a `QuantLayer` around it where the model is itself a single layer.
    """
    if found is None:
        if batches is None:
            raise ValueError("quantize_model needs a probe of the model, or batches to probe with")
        found = probe(model, batches)
    model = apply_plan(model, policy.resolve(found))
    if found.skipped and quant_layers(model):
        named = "; ".join(f"{name} ({why})" for name, why in found.skipped.items())
        log.info("left in float: %s", named)
    if found.shared and quant_layers(model):
        log.info("used at several places, quantized once: %s", ", ".join(found.shared))
    return model


def apply_plan(model: nn.Module, plan: Mapping[str, LayerPlan]) -> nn.Module:
    """Swaps layers as planned, in place and without data; a state dict then loads strictly.

    Raises:
        ValueError: a layer of the plan that the model does not have; nothing is swapped then.
    """
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    modules = {names[0]: module for module, names in places.items()}
    if missing := sorted(set(plan) - set(modules)):
        raise ValueError(f"the model has no layer {', '.join(missing)}; the plan is of another one")
    if any(isinstance(module, QuantLayer) for module in places):
        raise ValueError("the model is quantized already; apply a plan to the float model")
    for name, layer_plan in plan.items():
        if layer_plan.weight is None and layer_plan.activation is None:
            continue
        layer = modules[name]
        swapped = _quant_layer(layer, layer_plan)
        for place in places[layer]:
            parent, _, child = place.rpartition(".")
            if not place:
                model = swapped
            else:
                setattr(model.get_submodule(parent), child, swapped)
    return model


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers by name (`conv1.weight_quantizer`, `conv1.input_quantizer`), each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def quantizer_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What the quantizers learn, with names in the model."""
    return [
        (f"{name}.{key}" if name else key, parameter)
        for name, quantizer in quantizers(model).items()
        for key, parameter in quantizer.named_parameters()
    ]


def layer_plan(model: nn.Module) -> dict[str, LayerPlan]:
    """The plan that the model was built with; `apply_plan` rebuilds it from that."""
    layers = quant_layers(model)
    return {name: layer.plan for name, layer in layers.items() if layer.plan is not None}


def float_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Latent weights and all other state under the names of the unquantized model."""
    prefixes = [
        f"{name}." if name else ""
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLayer)
    ]
    state = {}
    for key, value in model.state_dict().items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is None:
            state[key] = value
            continue
        part, _, rest = key.removeprefix(prefix).partition(".")
        if part == "layer":
            state[prefix + rest] = value
    return state


def unquantized(model: nn.Module) -> dict[str, str]:
    """What has weights of two or more axes and stands in no quantized layer: name -> kind."""
    covered = {m.layer for m in quant_layers(model).values() if m.weight_quantizer is not None}
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if module not in covered
        and not isinstance(module, (*NORMS, Quantizer))
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }


def _quant_layer(layer: nn.Module, plan: LayerPlan) -> QuantLayer:
    weight, activation = plan.weight, plan.activation
    swapped = QuantLayer(
        layer,
        weight[0].build(weight[1]) if weight else None,
        activation[0].build(activation[1]) if activation else None,
    )
    swapped.plan = plan
    device = next(layer.parameters()).device
    for quantizer in (swapped.weight_quantizer, swapped.input_quantizer):
        if quantizer is not None:
            quantizer.to(device)
    return swapped.train(layer.training)
