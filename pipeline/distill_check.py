"""Whether a rung's losses between teachers and student exist and fit its teachers and networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..models.tapped import check_layers
from .config import DataConfig, ModelConfig, RunConfig, StageConfig
from .config_distill import DistillConfig, FeatureConfig
from .config_options import Mistake, check_options
from .data import DATASETS
from .features import build_features
from .losses import FEATURE_LOSSES, LOSSES
from .parents import is_distilled, parents_of
from .yaml_reader import path_text


def distill_mistakes(run: RunConfig, index: int) -> list[Mistake]:
    """Every mistake that can be seen without a network, with its key in the rung."""
    stage = run.ladder[index]
    distill = stage.distill
    if distill.teacher == "none":
        found = _without_teacher(stage)
    else:
        found = _loss(distill)
        found += _features(distill.features) if distill.features is not None else []
        if is_distilled(stage):
            found += _drop(distill, rungs=len(run.ladder), first=index == 0)
            found += _cache(stage, run.data)
    return [(f"distill.{key}" if key else "distill", text) for key, text in found]


def layer_mistakes(run: RunConfig, named: ModelConfig, model: nn.Module) -> list[str]:
    """Layers of feature losses that a network does not have, as `path: message` lines.

    Args:
        named: the network; only rungs that have it, as student or as teacher, are looked at.
        model: the same, built.
    """
    errors = []
    for index, features, above in _with_features(run):
        asked = {}
        if any(run.model_of(run.ladder[teacher]) == named for teacher in above):
            own = features.teacher_layers
            asked["layers" if own is None else "teacher_layers"] = own or features.layers
        if run.model_of(run.ladder[index]) == named:
            asked["layers"] = features.layers
        for key, layers in asked.items():
            for layer in dict.fromkeys(layers):
                try:
                    check_layers(model, [layer])
                except ValueError as error:
                    at = path_text(("ladder", index, "distill", "features", key))
                    errors.append(f"{at}: {named.name}: {error}")
    return errors


def size_mistakes(run: RunConfig, networks: Sequence[nn.Module], images: Tensor) -> list[str]:
    """Layers that a feature loss cannot compare, as `path: message` lines.

    Args:
        networks: those of the rungs, in ladder order, with all layers that are asked for.
        images: any few, (N, C, H, W).
    """
    errors = []
    for index, features, above in _with_features(run):
        student, *teachers = (networks[n].eval() for n in (index, *above))
        try:
            build_features(
                features, student=student, teachers=teachers, images=images, seed=run.seed
            )
        except ValueError as error:
            errors.append(f"{path_text(('ladder', index, 'distill', 'features'))}: {error}")
    return errors


def _with_features(run: RunConfig) -> Iterator[tuple[int, FeatureConfig, tuple[int, ...]]]:
    """The rungs that follow inner layers of teachers: position, settings, teachers' positions."""
    for index, stage in enumerate(run.ladder):
        features, above = stage.distill.features, parents_of(run, index).teachers
        if features is not None and stage.distill.follows_features and above:
            yield index, features, above


def _without_teacher(stage: StageConfig) -> list[Mistake]:
    if stage.full_precision or not stage.distill.follows_features:
        return []
    return [
        ("features", "follows a teacher, and teacher is none; name one, or give features: null")
    ]


def _loss(distill: DistillConfig) -> list[Mistake]:
    name, options = distill.loss, distill.options
    if name == "cross_entropy":
        text = "'cross_entropy' follows the labels, not a teacher; for these alone give weight: 0"
        return [("loss", text)]
    if name not in LOSSES and name in FEATURE_LOSSES:
        way_out = f"give it as distill.features: {{name: {name}, layers: [...]}}"
        return [("loss", f"{name!r} compares inner layers, not logits; {way_out}")]
    if found := check_options(LOSSES, name, options):
        return found
    try:
        LOSSES[name].factory(**options)
    except ValueError as error:
        return [("", str(error))]
    return []


def _features(own: FeatureConfig) -> list[Mistake]:
    if own.name not in FEATURE_LOSSES and own.name in LOSSES:
        way_out = f"give it as distill.loss: {own.name}"
        return [("features.name", f"{own.name!r} compares logits, not inner layers; {way_out}")]
    found = check_options(FEATURE_LOSSES, own.name, own.options)
    if not found:
        size = (1, 1, 2, 2)  # any: only the options are looked at
        try:
            FEATURE_LOSSES[own.name].factory(size, size, torch.Generator(), **own.options)
        except ValueError as error:
            found = [("", str(error))]
    return [(f"features.{key}" if key else "features", text) for key, text in found]


def _drop(distill: DistillConfig, *, rungs: int, first: bool) -> list[Mistake]:
    """A dense rung with few rungs above it keeps one teacher; a list must be longer than drop."""
    teacher, drop = distill.teacher, distill.drop
    if drop == 0:
        return []
    if isinstance(teacher, str) and teacher != "dense":
        return [("drop", f"needs several teachers, dense or a list of names, not {teacher!r}")]
    most = rungs - 1 if teacher == "dense" else len(teacher)
    if drop < most or first:  # which has no teacher, whatever is said above the ladder
        return []
    return [("drop", f"{drop} of {most} teachers leaves none; give less than {most}")]


def _cache(stage: StageConfig, data: DataConfig) -> list[Mistake]:
    """Logits can be kept where a teacher sees the same images in each epoch, and nothing else."""
    if not stage.distill.cache_teacher:
        return []
    found = []
    if stage.distill.follows_features:
        text = "keeps logits, and distill.features needs inner layers; take one of them out"
        found.append(("cache_teacher", text))
    if stage.train.augment and (how := _augmentation(data)):
        text = (
            f"needs the same images in each epoch, and {data.name} augments them ({how}); "
            "give train.augment: false, or take cache_teacher out"
        )
        found.append(("cache_teacher", text))
    return found


def _augmentation(data: DataConfig) -> str:
    """What the options of a data set say of its augmentation; a stage's start sees the rest."""
    if data.name not in DATASETS:
        return ""  # said with the data
    options = {name: p.default for name, p in DATASETS[data.name].options().items()} | data.options
    found = {name: options.get(name) for name in ("crop", "flip", "resized_crop")}
    return ", ".join(f"{name}: {value}" for name, value in found.items() if value)
