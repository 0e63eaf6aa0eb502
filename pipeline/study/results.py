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

COSTS = ("epochs", "teacher_forwards", "seconds")
KINDS = {
    **dict.fromkeys(("arm", "stage", "state", "diverged_at", "error", "key"), "object"),
    **dict.fromkeys(("seed", "fold", "position", "weight_bits", "activation_bits"), "Int64"),
    **dict.fromkeys(("test_images", "epochs", "trial_epochs", "teacher_forwards"), "Int64"),
    **dict.fromkeys(("val_top1", "test_top1", "fp32_top1", "seconds"), "float64"),
}
COLUMNS = (
    *("arm", "seed", "fold", "stage", "position", "state", "weight_bits", "activation_bits"),
    *("val_top1", "test_top1", "test_images", "fp32_top1"),
    *("epochs", "trial_epochs", "teacher_forwards", "seconds"),
    *("diverged_at", "error", "key"),
)


def results(study: Study, store: Store) -> pd.DataFrame:
    """One row per trial and stage, trials in their order; accuracies are fractions.

    A stage that diverged, and what is not trained after it in its trial, has the accuracy of chance
    (1 / number of classes) and names the stage in `diverged_at`; one that does not rest on it and
    that another trial has finished keeps its own. `epochs`, `teacher_forwards` (passes of a
    teacher over the training images) and `seconds` of training are summed over the row's quantized
    rung and those that it rests on, so one and the same stage costs the same in every arm;
    `trial_epochs` are those of all the trial's quantized rungs. `fp32_top1` is the test accuracy of
    the trial's full-precision rung of the same network.
    """
    import pandas as pd

    read = cache(store.read)  # stages that trials share are read once
    rows = [row for trial in study.trials for row in _rows(trial, store, read)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(KINDS)
    _fill_in_images(frame)
    return frame


def _rows(trial: Trial, store: Store, read: Any) -> Iterator[dict[str, Any]]:
    lost: PlannedStage | None = None  # the stage that diverged, with which the trial ended
    rests_on: dict[str, frozenset[str]] = {}  # by key: those of the stages it needs, and its own
    costs: dict[str, dict[str, float]] = {}  # of each quantized rung by itself
    fp32: dict[Any, float] = {}
    rungs = [rung for rung in trial.config.ladder if not rung.full_precision]
    trial_epochs = sum(rung.train.epochs for rung in rungs)
    for stage, rung in zip(trial.plan.stages, trial.config.ladder, strict=True):
        record: StageRecord | None = read(stage.key)
        state: str
        state, error = store.state(stage.key)
        needed = frozenset().union(*(rests_on[key] for key in stage.spec.parents.values()))
        rests_on[stage.key] = needed | {stage.key}
        if lost is None and record is None and (why := store.diverged(stage.key)):
            lost, error = stage, why
        ruined = lost is not None and (record is None or lost.key in needed)
        metrics = dict(record.metrics) if record is not None and not ruined else {}
        if ruined:
            state = "diverged"
            metrics = dict.fromkeys(("val_top1", "test_top1"), _chance(trial, read))
        network = json.dumps(trial.config.model_of(rung).model_dump(mode="json"))
        if rung.full_precision:
            fp32.setdefault(network, metrics.get("test_top1", float("nan")))
        else:
            costs[stage.key] = {
                "epochs": rung.train.epochs,
                "teacher_forwards": _teacher_forwards(trial.config, stage),
                "seconds": metrics.get("seconds", float("nan")),
            }
        own = [cost for key, cost in costs.items() if key in rests_on[stage.key]]
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
            **{name: sum(cost[name] for cost in own) for name in COSTS},
            "trial_epochs": trial_epochs,
            "diverged_at": lost.name if lost is not None and ruined else None,
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
    from ..runner import data_of  # imports the whole of training

    data = trial.config.data
    return 1 / data_of(data).num_classes


def _fill_in_images(frame: pd.DataFrame) -> None:
    """Gives diverged rows the size of the test set that other stages of their fold had."""
    known = frame.groupby("fold", dropna=False)["test_images"].transform("first")
    ruined = frame["state"] == "diverged"
    frame.loc[ruined, "test_images"] = known[ruined]
