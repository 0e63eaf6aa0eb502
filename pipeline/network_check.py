"""Each network of a ladder, tried on the data and the policies before the first rung is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import load_weights
from ..quant.probing import probe
from .config import ModelConfig, RunConfig
from .data import DataBundle
from .distill_check import layer_mistakes, size_mistakes
from .errors import ConfigError
from .network import build_network, describe_network
from .policy_check import check_policies


def check_networks(config: RunConfig, data: DataBundle) -> None:
    """Builds each network of the ladder once, loads its weights, and classifies two images.

    Raises:
        ConfigError: something does not fit, said in the words of whoever wrote the config; all
            networks are looked at first, then what losses compare in them, then the policies of
            all rungs.
    """
    images, _ = next(iter(data.validation.evaluation_batches(2, device=torch.device("cpu"))))
    tried: list[tuple[ModelConfig, nn.Module]] = []
    networks: list[nn.Module] = []  # of each rung
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
        networks.append(known)
    errors = errors or size_mistakes(config, networks, images)
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)))
    facts = {network: probe(network, [images]) for _, network in tried}
    check_policies(config, [facts[network] for network in networks])


def _try(
    named: ModelConfig, where: str, config: RunConfig, data: DataBundle, images: Tensor
) -> nn.Module:
    """The network as a rung has it, once it has classified the images."""
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
    return model
