"""What was run: the facts that one needs to repeat it, or to tell two runs apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..ladder_state import LadderState
from ..record import StageRecord
from ..run import Run
from ..spec import model_text
from ..store import Store

HIDDEN = ("name", "root", "batch_size")  # of the data: said elsewhere, or the reader's own


def facts(store: Store, run: Run, state: LadderState, done: int) -> dict[str, str]:
    """A run's facts by name; what is not known yet is missing.

    Args:
        done: how many of its rungs are.
    """
    records = [record for key in run.trained if (record := store.read(key)) is not None]
    found = {
        "run": run.run,
        "state": _state(state, done, len(run.stages)),
        "begun": f"{run.created[:16].replace('T', ' ')} UTC",
        "network": _joined(model_text(stage["spec"]["options"]["model"]) for stage in run.stages),
        "data": _data(run.config.get("data", {})),
        "seed": str(run.config.get("seed", "")),
        "epochs": ", ".join(_epochs(stage) for stage in run.stages),
        "trained on": _of_records(records, _machine),
        "versions": _of_records(records, _versions),
        "commit": _of_records(records, _commit),
    }
    return {name: text for name, text in found.items() if text}


def _state(state: LadderState, done: int, rungs: int) -> str:
    said = "not finished" if state == "interrupted" else state
    return said if state == "done" else f"{said}; {done} of {rungs} rungs are done"


def _data(data: Mapping[str, Any]) -> str:
    options = [f"{key}={value}" for key, value in data.items() if key not in HIDDEN]
    batches = [f"batches of {data['batch_size']}"] if "batch_size" in data else []
    return ", ".join([str(data.get("name", "")), *options, *batches])


def _epochs(stage: Mapping[str, Any]) -> str:
    return f"{stage['name']}: {stage['spec']['options']['stage']['train']['epochs']}"


def _of_records(records: Sequence[StageRecord], say: Any) -> str:
    return _joined(say(record.environment) for record in records)


def _machine(environment: Mapping[str, Any]) -> str:
    threads = environment.get("threads")
    plural = "" if threads == 1 else "s"
    return f"{environment.get('device_name')}, {threads} thread{plural}"


def _versions(environment: Mapping[str, Any]) -> str:
    names = ("bitladder", "torch", "torchvision", "numpy", "python")
    return ", ".join(f"{name} {environment[name]}" for name in names if environment.get(name))


def _commit(environment: Mapping[str, Any]) -> str:
    """Twelve digits of it: git takes them for the whole, and they fit into a column."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", environment.get("commit") or "")


def _joined(texts: Iterable[str]) -> str:
    """Each different text once."""
    return "; ".join(dict.fromkeys(text for text in texts if text))
