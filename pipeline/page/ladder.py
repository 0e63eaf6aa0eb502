"""The page of a ladder, or of several side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..forked import results_of
from ..ladder_state import ladder_state
from ..look import read_look
from ..resume_command import resume_command
from ..run import Run
from ..store import Store
from .facts import facts
from .render import embedded, render_page

if TYPE_CHECKING:
    import pandas as pd

    from ..figures import Drawn


@dataclass
class Rung:
    """A rung's part of the page.

    Attributes:
        run: whose it is.
        anchor: where links to it lead.
        figures: drawn, each with what is said of it.
        examples: by teacher, images that it and the student take for different things.
    """

    run: str
    name: str
    anchor: str
    figures: list[Mapping[str, str]] = field(default_factory=list)
    examples: dict[str, list[Mapping[str, str]]] = field(default_factory=dict)


def ladder_page(
    store: Store | None,
    runs: Sequence[Run],
    frame: pd.DataFrame,
    *,
    shown: pd.DataFrame,
    notes: Sequence[str],
    speeds: pd.DataFrame,
) -> str:
    """The page as text.

    Args:
        store: where the runs are; None where there are none to look up.
        runs: those of which more than the table is shown.
        frame: the report.
        shown: its columns for people, as text.
        notes: lines to stand below the table.
        speeds: of packed networks, as text; may be empty.
    """
    from ..figures import ladder_figures, rows_of

    rows = rows_of(frame)
    above: list[Mapping[str, str]] = []
    known = [] if store is None else [(store, run) for run in runs]
    rungs = {
        (run.run, str(stage["name"])): _rung(where, run, stage)
        for where, run in known
        for stage in run.stages
    }
    shown_figures = list(ladder_figures(store, runs, rows))
    draw = partial(_figure, several=len(runs) > 1)
    drawings = results_of([partial(draw, each) for each in shown_figures])
    for each, figure in zip(shown_figures, drawings, strict=True):
        if each.run is None or each.stage is None:
            above.append(figure)
        else:
            rungs[each.run, each.stage].figures.append(figure)
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_run.setdefault(row["run"], []).append(row)
    states = {
        run.run: ladder_state(where, run, [row["state"] for row in by_run[run.run]])
        for where, run in known
    }
    done = {run: sum(row["state"] == "done" for row in own) for run, own in by_run.items()}
    values = {
        "title": ", ".join(by_run),
        "facts": _side_by_side(
            [facts(where, run, states[run.run], done[run.run]) for where, run in known]
        ),
        "table": shown,
        "notes": notes,
        "problems": [
            _problem(store, run, own)
            for run, own in by_run.items()
            if states.get(run, "done") != "done" or done[run] < len(own)
        ],
        "figures": above,
        "speeds": speeds,
        "rungs": [rung for rung in rungs.values() if rung.figures or rung.examples],
        "configs": {run.run: json.dumps(run.config, indent=1) for run in runs},
        "csv": frame.to_csv(index=False, lineterminator="\n"),
    }
    return render_page("ladder.html", values)


def _rung(store: Store, run: Run, stage: Mapping[str, Any]) -> Rung:
    name = str(stage["name"])
    record = store.read(stage["key"])
    look = (read_look(store, record) if record else None) or {}
    rung = Rung(run.run, name, anchor=f"{run.run}-{name}")
    classes = look.get("classes", ())

    def named(label: int) -> str:
        return str(classes[label]) if label < len(classes) else str(label)

    for teacher in look.get("teachers", ()):
        own: list[Mapping[str, str]] = []
        for example in teacher["examples"]:
            words = {side: named(example[side]) for side in ("target", "student", "teacher")}
            own.append({"png": example["png"], **words})
        if own:
            rung.examples[run.named(teacher["key"])] = own
    return rung


def _figure(each: Drawn, *, several: bool) -> Mapping[str, str]:
    said = f"{each.run}. {each.caption}" if several and each.run else each.caption
    return {"name": each.name, "caption": said, "drawing": embedded(each.draw(), said)}


def _side_by_side(found: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Each fact of every run; once where it is the same in all."""
    names = dict.fromkeys(name for each in found for name in each)
    table = {name: [each.get(name, "-") for each in found] for name in names}
    return {name: v[:1] if len(set(v)) == 1 else v for name, v in table.items()}


def _problem(store: Store | None, run: str, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of a run that is not finished: what failed, and the command that goes on with it."""
    return {
        "run": run,
        "errors": [f"{row['stage']}: {row['error']}" for row in rows if row["error"]],
        "running": [row["stage"] for row in rows if row["state"] == "running"],
        "resume": resume_command(store, run),
    }
