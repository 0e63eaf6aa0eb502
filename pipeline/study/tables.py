"""The tables of a study: every arm's summary, the comparisons, and the choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import statistics
from .statistics import Candidate, Choice, Paired, Verdict, holm, paired, sample
from .trials import Study

if TYPE_CHECKING:
    import pandas as pd

VALUES = ("test_top1", "val_top1", "fp32_top1")
COSTS = ("epochs", "trial_epochs", "teacher_forwards", "seconds")


@dataclass(frozen=True)
class Tables:
    """What is written and shown.

    Attributes:
        rows: a row per trial and stage, see `results`.
        seeds: a row per arm, stage and seed, folds pooled; nan where one is not finished.
        summary: a row per arm and stage.
        comparisons: a row per comparison, family by family.
        choice: None where the study asks for none.
    """

    rows: pd.DataFrame
    seeds: pd.DataFrame
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    choice: Choice | None


def tables(study: Study, rows: pd.DataFrame) -> Tables:
    """All tables from the results of the trials."""
    seeds = pooled(rows)
    return Tables(rows, seeds, summary(seeds), comparisons(study, seeds), choice(study, seeds))


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per arm, stage and seed.

    Test accuracies are weighted by the folds' test images, so each image counts once; validation
    is the folds' mean. A seed has a value when all its folds have one. Costs are a fold's mean.
    """
    import pandas as pd

    found = []
    for (arm, stage, seed), folds in rows.groupby(["arm", "stage", "seed"], sort=False):
        images = folds["test_images"].astype("float64").fillna(1.0)
        row: dict[str, Any] = {"arm": arm, "stage": stage, "seed": seed}
        row["position"] = folds["position"].iloc[0]
        row["folds"] = len(folds)
        row["diverged"] = int((folds["state"] == "diverged").sum())
        for name in ("test_top1", "fp32_top1"):
            row[name] = (folds[name] * images).sum(skipna=False) / images.sum()
        row["val_top1"] = folds["val_top1"].mean(skipna=False)
        row |= {name: folds[name].mean() for name in COSTS}
        row["keys"] = " ".join(folds["key"])
        found.append(row)
    columns = ["arm", "stage", "position", "seed", "folds", "diverged", *VALUES, *COSTS, "keys"]
    return pd.DataFrame(found, columns=columns)


def summary(seeds: pd.DataFrame) -> pd.DataFrame:
    """A row per arm and stage, arms in the study's order.

    `n` of `seeds` have a value; `drop` is the mean of FP32's test accuracy less the stage's, seed
    by seed; `values` has every seed's, `-` where it is not finished. Costs are a trial's mean.
    """
    import pandas as pd

    found = []
    for (arm, stage), group in seeds.groupby(["arm", "stage"], sort=False):
        test = sample(list(group["test_top1"].dropna()))
        validation = sample(list(group["val_top1"].dropna()))
        row = {
            "arm": arm,
            "stage": stage,
            "seeds": len(group),
            "n": test.n,
            "diverged": int(group["diverged"].sum()),
            "mean": test.mean,
            "sd": test.sd,
            "low": test.low,
            "high": test.high,
            "drop": sample(list((group["fp32_top1"] - group["test_top1"]).dropna())).mean,
            "val_mean": validation.mean,
            "val_sd": validation.sd,
            **{name: group[name].mean() for name in COSTS},
            "values": " ".join("-" if pd.isna(v) else repr(float(v)) for v in group["test_top1"]),
        }
        found.append(row)
    return pd.DataFrame(found)


def comparisons(study: Study, seeds: pd.DataFrame) -> pd.DataFrame:
    """A row per comparison: paired differences of test accuracy, arm minus against.

    `p_holm` is adjusted over the family; the interval is not.
    """
    import pandas as pd

    found: list[dict[str, Any]] = []
    for family in dict.fromkeys(c.family for c in study.comparisons):
        of = [c for c in study.comparisons if c.family == family]
        pairs = [
            paired(
                values_by_seed(seeds, c.arm, c.stage),
                values_by_seed(seeds, c.against, c.against_stage),
            )
            for c in of
        ]
        for comparison, pair, adjusted in zip(of, pairs, holm([p.p for p in pairs]), strict=True):
            known = pair.n >= 2
            found.append(
                {
                    **comparison.__dict__,
                    "n": pair.n,
                    "difference": pair.difference,
                    "sd": pair.sd,
                    "low_unadjusted": pair.low,
                    "high_unadjusted": pair.high,
                    "p": pair.p,
                    "p_holm": adjusted if known else statistics.NAN,
                    "verdict": statistics.verdict(pair.difference, adjusted),
                    "missing_seeds": " ".join(map(str, _missing(study, pair))),
                }
            )
    columns = [
        *("family", "arm", "stage", "against", "against_stage", "n", "difference", "sd"),
        *("low_unadjusted", "high_unadjusted", "p", "p_holm", "verdict", "missing_seeds"),
    ]
    return pd.DataFrame(found, columns=columns)


def choice(study: Study, seeds: pd.DataFrame) -> Choice | None:
    """The arm that validation and cost choose; the test split has no part in it."""
    if study.choose is None:
        return None
    candidates = []
    for arm, stage in study.choose.stages.items():
        own = seeds[(seeds["arm"] == arm) & (seeds["stage"] == stage)]
        costs = own[["epochs", "teacher_forwards"]].mean()
        candidates.append(
            Candidate(
                arm,
                values_by_seed(seeds, arm, stage, "val_top1"),
                float(costs["epochs"]),
                float(costs["teacher_forwards"]),
            )
        )
    return statistics.choose(candidates)


def said(verdict: Verdict, arm: str, against: str) -> str:
    """A verdict with the arm's own name."""
    names = {"arm better": f"{arm} better", "against better": f"{against} better"}
    return names.get(verdict, verdict)


def values_by_seed(
    seeds: pd.DataFrame, arm: str, stage: str, value: str = "test_top1"
) -> dict[int, float]:
    """Of an arm at a stage the seeds that have a value, with it."""
    own = seeds[(seeds["arm"] == arm) & (seeds["stage"] == stage)].dropna(subset=[value])
    return {int(s): float(v) for s, v in zip(own["seed"], own[value], strict=True)}


def _missing(study: Study, pair: Paired) -> list[int]:
    return [seed for seed in study.seeds if seed not in pair.seeds]
