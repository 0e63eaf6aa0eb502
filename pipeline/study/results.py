"""What a study's trials have come to so far: a row per trial and stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..record import StageRecord
from ..spec import PlannedStage
from ..store import Store
from .trials import Study, Trial

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    **dict.fromkeys(("arm", "stage", "state", "diverged_at", "error", "key"), "object"),
    **dict.fromkeys(("seed", "fold", "position", "weight_bits", "activation_bits"), "Int64"),
    **dict.fromkeys(("test_images", "epochs", "teacher_forwards"), "Int64"),
    **dict.fromkeys(("val_top1", "test_top1", "fp32_top1", "seconds"), "float64"),
}
COLUMNS = (
    *("arm", "seed", "fold", "stage", "position", "state", "weight_bits", "activation_bits"),
    *("val_top1", "test_top1", "test_images", "fp32_top1", "epochs", "teacher_forwards", "seconds"),
    *("diverged_at", "error", "key"),
)


def results(study: Study, store: Store) -> pd.DataFrame:
    """One row per trial and stage, trials in their order; accuracies are fractions.

    A stage that diverged, and all after it in its trial, has the accuracy of chance (1 / number
    of classes) and names the stage in `diverged_at`. `epochs`, `teacher_forwards` (passes of a
    teacher over the training images) and `seconds` of training are summed over the quantized rungs
    of the trial up to the row's, shared ones included. `fp32_top1` is the test accuracy of the
    trial's full-precision rung of the same network.
    """
    import pandas as pd

    read = cache(store.read)  # stages that trials share are read once
    rows = [row for trial in study.trials for row in _rows(trial, store, read)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(KINDS)
    _fill_in_images(frame)
    return frame


def _rows(trial: Trial, store: Store, read: Any) -> Iterator[dict[str, Any]]:
    ruined: str | None = None  # the stage that diverged
    spent: dict[str, Any] = {"epochs": 0, "teacher_forwards": 0, "seconds": 0.0}
    fp32: dict[Any, float] = {}
    for stage, rung in zip(trial.plan.stages, trial.config.ladder, strict=True):
        record: StageRecord | None = read(stage.key)
        state: str
        state, error = store.state(stage.key)
        if ruined is None and record is None and (why := store.diverged(stage.key)):
            ruined, error = stage.name, why
        metrics = dict(record.metrics) if record is not None and ruined is None else {}
        if ruined is not None:
            state = "diverged"
            metrics = dict.fromkeys(("val_top1", "test_top1"), _chance(trial, read))
        network = json.dumps(trial.config.model_of(rung).model_dump(mode="json"))
        if rung.full_precision:
            fp32.setdefault(network, metrics.get("test_top1", float("nan")))
        else:
            spent["epochs"] += rung.train.epochs
            spent["teacher_forwards"] += _teacher_forwards(trial.config, stage)
            spent["seconds"] += metrics.get("seconds", float("nan"))
        yield {
            "arm": trial.arm,
            "seed": trial.seed,
            "fold": trial.fold,
            "stage": stage.name,
            "position": stage.position,
            "state": state,
            "weight_bits": rung.weight_bits,
            "activation_bits": rung.activation_bits,
            **{name: metrics.get(name) for name in ("val_top1", "test_top1", "test_images")},
            "fp32_top1": fp32.get(network),
            **spent,
            "diverged_at": ruined,
            "error": error,
            "key": stage.key,
        }


def _teacher_forwards(config: RunConfig, stage: PlannedStage) -> int:
    """Passes of a teacher over the training images; of candidates one is the teacher."""
    rung = config.ladder[stage.position]
    roles = [role.partition("-")[0] for role in stage.spec.parents]
    teachers = roles.count("teacher")
    if teachers > 1:
        teachers = max(teachers - rung.distill.drop, 1)
    return rung.train.epochs * (teachers or int("candidate" in roles))


def _chance(trial: Trial, read: Any) -> float:
    """The accuracy of guessing."""
    for stage in trial.plan.stages:
        if (record := read(stage.key)) is not None:
            return 1 / int(record.network["num_classes"])
    from ..runner import load_data  # imports the whole of training

    data = trial.config.data
    return 1 / load_data(data.name, json.dumps(data.options, sort_keys=True)).num_classes


def _fill_in_images(frame: pd.DataFrame) -> None:
    """Gives diverged rows the size of the test set that other stages of their fold had."""
    known = frame.groupby("fold", dropna=False)["test_images"].transform("first")
    ruined = frame["state"] == "diverged"
    frame.loc[ruined, "test_images"] = known[ruined]
