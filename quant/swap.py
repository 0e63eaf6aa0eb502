"""Turning a float model into a quantized one, and reading it back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .core import Quantizer
from .layers import QUANTIZABLE, QuantLayer
from .policy import LayerPlan, QuantPolicy
from .probing import Inputs, Probe, names_of, probe, weighty

log = logging.getLogger(__name__)

__all__ = [
    "Probe",
    "apply_plan",
    "float_state_dict",
    "input_quantizers",
    "layer_plan",
    "probe",
    "quant_layers",
    "quantize_model",
    "quantizer_parameters",
    "quantizers",
    "unquantized",
    "weight_layers",
]


def quantize_model(
    model: nn.Module,
    policy: QuantPolicy,
    found: Probe | None = None,
    *,
    inputs: Inputs | None = None,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Swaps the layers that the policy quantizes for `QuantLayer`s, in place.

    The quantizers still have to be calibrated. `describe` lists what was quantized, and what was
    left alone and why; the latter is logged too.

    Args:
        model: float model.
        policy: widths and methods.
        found: what `probe` found; or give one of the next two.
        inputs: an example to probe with: a tensor (N, ...), or a mapping of keyword arguments.
        batches: several, each as above or a tuple that begins with the tensor.

    Returns:
        The model; a `QuantLayer` around it where the model is itself a single layer.

    Raises:
        ValueError: nothing to probe with, a model without a layer that could be quantized, one
            that is quantized already, or a policy that some layer cannot follow.
    """
    if found is None:
        if inputs is not None:
            batches = [inputs]
        if batches is None:
            raise ValueError(
                "quantize_model has to see the model run: give inputs=, an example of its input, "
                "or batches=, or what probe() found"
            )
        found = probe(model, batches)
    plan = policy.resolve(found)
    model = apply_plan(model, plan)
    for number in policy.unused_rules(found):
        log.warning("no layer fits %s", policy.rules[number])
    if quant_layers(model):
        if found.skipped:
            named = "; ".join(f"{name} ({why})" for name, why in found.skipped.items())
            log.info("left in float: %s", named)
        if found.shared:
            log.info("used at several places, quantized once: %s", ", ".join(found.shared))
    elif not policy.full_precision:
        log.warning("the policy leaves every layer in float: %s", ", ".join(plan))
    return model


def apply_plan(model: nn.Module, plan: Mapping[str, LayerPlan]) -> nn.Module:
    """Swaps layers as planned, in place and without data; a state dict then loads strictly.

    Layers that share one weight share its quantizer.

    Raises:
        ValueError: a layer of the plan that the model does not have, or one weight planned in two
            ways; nothing is swapped then.
    """
    places = names_of(model)
    modules = {names[0]: module for module, names in places.items()}
    if missing := sorted(set(plan) - set(modules)):
        raise ValueError(f"the model has no layer {', '.join(missing)}; the plan is of another one")
    if any(isinstance(module, QuantLayer) for module in places):
        raise ValueError("the model is quantized already; apply a plan to the float model")
    chosen = {n: p for n, p in plan.items() if p.weight is not None or p.activation is not None}
    _check_tied({name: modules[name] for name in plan}, plan)
    tied: dict[Any, Quantizer] = {}  # by latent weight
    for name, layer_plan in chosen.items():
        layer = modules[name]
        swapped = _quant_layer(layer, layer_plan)
        if swapped.weight_quantizer is not None:
            swapped.weight_quantizer = tied.setdefault(swapped.latent, swapped.weight_quantizer)
        for place in places[layer]:
            parent, _, child = place.rpartition(".")
            if not place:
                model = swapped
            else:
                setattr(model.get_submodule(parent), child, swapped)
    _leave_fast_paths(model)
    return model


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def weight_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The layers whose weight is quantized, by name; of those that share one weight the first."""
    found: dict[Any, str] = {}
    layers = {n: m for n, m in quant_layers(model).items() if m.weight_quantizer is not None}
    for name, layer in layers.items():
        found.setdefault(layer.latent, name)
    return {name: layers[name] for name in found.values()}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers by name (`conv1.weight_quantizer`, `conv1.input_quantizer`), each once.

    Not those that stand inside another one, whose part they are.
    """
    found: dict[str, Quantizer] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module not in inside:
            found[name] = module
            inside.update(module.modules())
    return found


def input_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of layers' inputs by name."""
    return {
        f"{name}.input_quantizer" if name else "input_quantizer": layer.input_quantizer
        for name, layer in quant_layers(model).items()
        if layer.input_quantizer is not None
    }


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


def unquantized(model: nn.Module, found: Probe | None = None) -> dict[str, str]:
    """What has weights of two or more axes and keeps them in float: name -> kind and reason.

    Args:
        found: the probe of the float model. It alone tells a layer that does not run from one
            that the policy left in float.
    """
    skipped = found.skipped if found else {}
    layers = quant_layers(model)
    swapped = {f"{name}.layer" if name else "layer": name for name in layers}
    left = {}
    for name, module, what in weighty(model):
        if name in swapped:
            name = swapped[name]
            if layers[name].weight_quantizer is None:
                left[name] = f"{what}: only its input is quantized"
        elif isinstance(module, QUANTIZABLE) and name not in skipped:
            why = "in float by the policy" if found else "not in the plan"
            left[name] = f"{what}: {why}"
        else:
            left[name] = skipped.get(name, what)
    return left


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


def _check_tied(layers: Mapping[str, nn.Module], plan: Mapping[str, LayerPlan]) -> None:
    """Refuses one weight at two widths, or by two methods: it could not be stored once."""
    seen: dict[Any, str] = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(f"layer {name!r} has no parameter named weight to quantize")
        other = seen.setdefault(weight, name)
        if plan[other].weight != plan[name].weight:
            raise ValueError(
                f"layers {other!r} and {name!r} share one weight, which is to be quantized in two "
                f"ways ({_said(plan[other])} and {_said(plan[name])}); give both the same width "
                "and method by rules"
            )


def _said(plan: LayerPlan) -> str:
    return f"{plan.weight[0].name} at {plan.weight_bits} bits" if plan.weight else "float"


def _leave_fast_paths(model: nn.Module) -> None:
    """Makes torch's transformer layers call their linear layers in evaluation as in training.

    Without gradients they hand the weights of all their parts to one fused function, latent
    ones here; what they read to decide so is of no other use.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and quant_layers(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and quant_layers(module):
            module.use_nested_tensor = False  # nested tensors have the fused function alone
