"""The tables of a study as people read them, with what a reader must know beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..config import DataConfig
from ..store import Store
from .statistics import Choice
from .tables import Tables, said
from .trials import Study

if TYPE_CHECKING:
    import pandas as pd

ALL = "(all arms)"


def stage_tables(study: Study, found: Tables) -> dict[str, pd.DataFrame]:
    """By stage, a row for each arm that has it; one row for all where all share it."""
    import pandas as pd

    tables = {}
    for stage in stages(found):
        rows = found.summary[found.summary["stage"] == stage].to_dict("records")
        if shared_by_all(study, found, stage):
            rows = [{**rows[0], "arm": ALL, "trial_epochs": math.nan}]  # each arm has its own
        tables[stage] = pd.DataFrame([_summary_row(row) for row in rows])
    return tables


def stages(found: Tables) -> list[str]:
    """Names of all stages, by their place in the ladders."""
    order = found.seeds.groupby("stage", sort=False)["position"].max()
    return [str(stage) for stage in order.sort_values(kind="stable").index]


def shared_by_all(study: Study, found: Tables, stage: str) -> bool:
    """Whether every one of several arms has this stage, and it is one and the same."""
    own = found.seeds[found.seeds["stage"] == stage]
    one = own.groupby("seed")["keys"].nunique().max() == 1
    return len(study.arms) > 1 and own["arm"].nunique() == len(study.arms) and bool(one)


def _summary_row(row: dict[Any, Any]) -> dict[str, str]:
    values = [v if v == "-" else f"{100 * float(v):.2f}" for v in row["values"].split()]
    return {
        "arm": row["arm"],
        "n": f"{row['n']}" if row["n"] == row["seeds"] else f"{row['n']} of {row['seeds']}",
        "mean": _percent(row["mean"]),
        "sd": _percent(row["sd"]),
        "95 % of the mean": _interval(row["low"], row["high"]),
        "drop": _percent(row["drop"], "+"),
        "validation": _percent(row["val_mean"]),
        "diverged": str(row["diverged"]),
        "epochs": _number(row["epochs"]),
        "of all rungs": _number(row["trial_epochs"]),
        "teacher": _number(row["teacher_forwards"]),
        "seconds": _number(row["seconds"], 1),
        "every value": " ".join(values),
    }


def comparison_table(comparisons: pd.DataFrame, family: str) -> pd.DataFrame:
    """One family's comparisons: arm minus against."""
    import pandas as pd

    rows = comparisons[comparisons["family"] == family].to_dict("records")
    return pd.DataFrame(
        {
            "arm - against": [sides(row) for row in rows],
            "n": [str(row["n"]) for row in rows],
            "difference": [_percent(row["difference"], "+") for row in rows],
            "sd": [_percent(row["sd"]) for row in rows],
            "95 %, unadjusted": [
                _interval(row["low_unadjusted"], row["high_unadjusted"], "+") for row in rows
            ],
            "p": [_p_value(row["p"]) for row in rows],
            "p, Holm": [_p_value(row["p_holm"]) for row in rows],
            "verdict": [said(row["verdict"], row["arm"], row["against"]) for row in rows],
            "seeds not paired": [row["missing_seeds"] for row in rows],
        }
    )


def choice_text(study: Study, choice: Choice) -> str:
    """What was chosen, from what, and by which rule."""
    assert study.choose is not None
    arms = _at_stages(study.choose.stages)
    if choice.chosen is None:
        return f"Nothing is chosen yet of {arms}: no seed is finished in all of them."
    n = len(choice.seeds)
    lines = [f"Chosen on validation: {choice.chosen}, of {arms}; n = {n} seeds that all have."]
    if n < len(study.seeds):
        lines.append(f"Provisional: {n} of {len(study.seeds)} seeds.")
    best = choice.best or ""
    lines.append(
        f"Best mean validation accuracy: {best}, {_percent(choice.means[best])} %, "
        f"{_cost(choice, best)}."
    )
    for arm, pair in choice.differences.items():
        tie = "a tie" if arm in choice.ties else "worse, not taken"
        interval = _interval(pair.low, pair.high, "+") or f"none, n = {n} or no spread"
        lines.append(
            f"{arm} - {best}: {_percent(pair.difference, '+')} points of validation accuracy, 95 % "
            f"interval (unadjusted) {interval}, {_cost(choice, arm)}: {tie}."
        )
    lines.append(
        "A tie: the paired t-test does not tell the arm from the best one (p of 0.05 or more), "
        "which with few seeds says little. Among ties the cheapest is taken: fewest epochs, then "
        "fewest teacher forwards, then the better validation accuracy, then the order of the "
        "study. Test accuracies have no part in this."
    )
    return "\n".join(lines)


def _at_stages(stages: Mapping[str, str]) -> str:
    """`ladder, direct at w1a1`, or each with its own stage where they differ."""
    if len(set(stages.values())) == 1:
        return f"{', '.join(stages)} at {next(iter(stages.values()))}"
    return ", ".join(f"{arm} at {stage}" for arm, stage in stages.items())


def _cost(choice: Choice, arm: str) -> str:
    epochs, forwards = choice.costs[arm]
    return f"{_number(epochs)} epochs and {_number(forwards)} teacher forwards"


def notes(study: Study, store: Store, found: Tables) -> list[str]:
    """How far the study is, what failed, and what the columns mean."""
    return [
        _progress(study, found),
        *_failures(found),
        *_meaning(study, found),
        *_hardware(store, found),
    ]


def _progress(study: Study, found: Tables) -> str:
    last = found.rows.groupby(["arm", "seed", "fold"], dropna=False, sort=False)["state"]
    ended = last.agg(lambda states: _trial_state(set(states)))
    counts = ended.value_counts()
    done, diverged = counts.get("done", 0), counts.get("diverged", 0)
    folds = f" x {study.folds} folds" if study.folds else ""
    distinct = found.rows["key"].nunique()
    line = (
        f"{done + diverged} of {len(study.trials)} trials have ended ({done} done, {diverged} "
        f"diverged): {len(study.arms)} arms x {len(study.seeds)} seeds{folds}; "
        f"{distinct} different stages."
    )
    if done + diverged < len(study.trials):
        line += " Until all have ended every verdict is provisional: who stops at a good one errs."
    return line


def _trial_state(states: set[str]) -> str:
    if "diverged" in states:
        return "diverged"
    return "done" if states == {"done"} else "not ended"


def _failures(found: Tables) -> Iterator[str]:
    rows = found.rows
    ruined = rows[(rows["state"] == "diverged") & (rows["stage"] == rows["diverged_at"])]
    for row in ruined.to_dict("records"):
        yield (
            f"Diverged: {_trial(row)} at {row['stage']} ({row['error']}). It counts with the "
            f"accuracy of chance, {_percent(row['test_top1'])} %, there and in what is not trained "
            "after it."
        )
    for row in rows[rows["state"] == "failed"].to_dict("records"):
        yield f"Failed, and not counted: {_trial(row)} at {row['stage']} ({row['error']})."


def _trial(row: dict[Any, Any]) -> str:
    import pandas as pd

    fold = "" if pd.isna(row["fold"]) else f", fold {row['fold']}"
    return f"{row['arm']}, seed {row['seed']}{fold}"


def _meaning(study: Study, found: Tables) -> Iterator[str]:
    data = sorted({_data_text(trial.config.data) for trial in study.trials})
    yield (
        f"Data: {', '.join(data)}. Accuracies are top-1 of the test split, read once, at the end "
        "of a stage. drop: FP32 of the same seed less the stage."
    )
    if study.folds:
        yield (
            f"A seed's value is that of its {study.folds} folds together, every image once; folds "
            "are not independent, so n counts seeds. diverged counts folds."
        )
    yield (
        "A seed decides first weights and order of training; the splits of the data are the same "
        "in all seeds. So intervals and p-values are about training again on these data, not about "
        "other data."
    )
    yield (
        "95 % of the mean: t-interval of an arm by itself; seeds are paired between arms, so these "
        "do not tell arms apart. Differences are paired by seed; their 95 % t-intervals are not "
        "adjusted for the other comparisons, the verdict is by p-values of the paired t-test, "
        "adjusted over the family (Holm, 1979), at 0.05; families are not adjusted for each other. "
        "A comparison without a p-value yet counts in its family with p = 1. Not resolved: this "
        "study cannot tell, which is not that the arms are equal."
    )
    if (found.comparisons["sd"] == 0).any():
        yield (
            "Where all differences are the same there is no spread for a t-test and no interval: "
            "p is 1 if they are 0, else that of the sign-flip test, 2 / 2^n."
        )
    yield (
        "Costs are of one trial, for the stage and the rungs that it rests on by its first weights "
        "and its teachers, FP32 not counted: epochs; teacher, passes of a teacher over the "
        "training images; seconds of training. of all rungs: epochs of the whole trial, for who "
        "needs all its widths."
    )


def _data_text(data: DataConfig) -> str:
    """A data set with what is left of it: `fashion_mnist (limit=12000)`."""
    hidden = ("fold", "folds", "root")  # said elsewhere, or the reader's own
    options = ", ".join(f"{k}={v}" for k, v in data.options.items() if k not in hidden)
    return f"{data.name} ({options})" if options else data.name


def _hardware(store: Store, found: Tables) -> Iterator[str]:
    seen: dict[str, None] = {}
    for key in dict.fromkeys(found.rows["key"]):
        if (record := store.read(key)) is not None:
            facts = record.environment
            threads = facts.get("threads")
            plural = "" if threads == 1 else "s"
            line = f"{facts.get('device_name')}, {threads} thread{plural}, torch "
            seen[line + f"{facts.get('torch')}"] = None
    if seen:
        yield f"Trained on: {'; '.join(seen)}."


def sides(row: dict[Any, Any]) -> str:
    """A comparison's arms, with the stage, or each with its own."""
    if row["stage"] == row["against_stage"]:
        return f"{row['arm']} - {row['against']} at {row['stage']}"
    return f"{row['arm']} at {row['stage']} - {row['against']} at {row['against_stage']}"


def _percent(value: float, sign: str = "") -> str:
    return "" if math.isnan(value) else format(100 * value, f"{sign}.2f")


def _interval(low: float, high: float, sign: str = "") -> str:
    return "" if math.isnan(low) else f"{_percent(low, sign)} .. {_percent(high, sign)}"


def _p_value(p: float) -> str:
    if math.isnan(p):
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _number(value: float, digits: int = 0) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
