"""Each network of a ladder, tried on the data and the policies before the first rung is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..models import load_weights
from ..quant.probing import Probe, probe
from .config import ModelConfig, RunConfig
from .data import DataBundle
from .distill_check import layer_mistakes
from .errors import ConfigError
from .network import build_network, describe_network
from .policy_check import check_policies


def check_networks(config: RunConfig, data: DataBundle) -> None:
    """Builds each network of the ladder once, loads its weights, and classifies two images.

    Raises:
        ConfigError: something does not fit, said in the words of whoever wrote the config; all
            networks are looked at first, then the policies of all rungs.
    """
    images, _ = next(iter(data.validation.evaluation_batches(2, device=torch.device("cpu"))))
    tried: list[tuple[ModelConfig, Probe]] = []
    facts: list[Probe] = []
    errors: list[str] = []
    for index, stage in enumerate(config.ladder):
        model = config.model_of(stage)
        known = next((found for other, found in tried if other == model), None)
        if known is None:
            where = "model" if stage.model is None else f"ladder.{index}.model"
            try:
                known = _try(model, where, config, data, images)
            except ConfigError as error:
                errors += error.errors
                continue
            tried.append((model, known))
        facts.append(known)
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
    check_policies(config, facts)


def _try(
    named: ModelConfig, where: str, config: RunConfig, data: DataBundle, images: Tensor
) -> Probe:
    try:
        network = describe_network({"name": named.name, "options": named.options}, data)
        model = build_network(network, seed=config.seed)
    except (ValueError, TypeError) as error:
        raise ConfigError([f"{where}: {error}"]) from None
    if named.weights is not None:
        try:
            load_weights(model, Path(named.weights), key_map=named.key_map)
        except (ValueError, OSError) as error:
            raise ConfigError([f"{where}.weights: {error}"]) from None
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = "x".join(str(n) for n in images.shape[1:])
        reason = str(error).partition("\n")[0]
        text = f"{where}: {named.name} cannot take images of {shape}: {reason}"
        raise ConfigError([text]) from None
    found = tuple(getattr(logits, "shape", ()))
    if found != (len(images), data.num_classes):
        given = f"gives {found or type(logits).__name__}"
        raise ConfigError(
            [
                f"{where}: {named.name} {given} for {len(images)} images, but "
                f"{config.data.name} has {data.num_classes} classes: it must give "
                f"({len(images)}, {data.num_classes})"
            ]
        )
    if errors := layer_mistakes(config, named, model):
        raise ConfigError(errors)
    return probe(model, [images])
