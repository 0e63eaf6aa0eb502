"""What Prefect's pages show of a ladder: its table, and of each rung a bar and a page; and links.

All of it is read from the store, as `bitladder report` reads it: a page says nothing else.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any, cast
from uuid import UUID

from ..pipeline.derived import pack_spec
from ..pipeline.errors import StageError
from ..pipeline.events import Event
from ..pipeline.record import PACKED
from ..pipeline.resume_command import resume_command
from ..pipeline.store import Store
from .progress import describe, filled, heading, throttled

log = logging.getLogger(__name__)
ARTIFACT_SECONDS = 5.0  # between two updates of a progress artifact; one costs 7 ms
# Prefect's table squeezes its columns into the page: those that a ladder is judged by
_TABLE = ("stage", "state", "W", "A", "teacher", "test %", "drop", "packed %", "size kB", "ratio")
_LABELS = {
    "W": "weight bits",
    "A": "activation bits",
    "val %": "validation, %",
    "test %": "test, %",
    "drop": "drop against FP32, points",
    "levels": "levels used, weights / activations",
    "packed %": "test of the packed network, %",
    "size kB": "packed size, kB",
    "ideal kB": "ideal size, kB",
    "ratio": "times smaller than float32",
    "Gbitops": "bit operations an image, 10^9",
}
_LOCAL = "On the machine that ran the ladder; most browsers want the path copied, not clicked."


class Artifacts:
    """Shows a ladder as Prefect artifacts: a listener, used inside its flow run.

    Never raises: at the first failure it warns, and stays silent from then on.
    """

    def __init__(self, run_id: str, store: Store) -> None:
        self._run_id, self._store = run_id, store
        self._table: UUID | None = None
        self._progress: UUID | None = None
        self._works = True
        self._tell = filled(throttled(self._show, seconds=ARTIFACT_SECONDS))

    def __call__(self, event: Event) -> None:
        """Hears an event; training waits meanwhile: 7 ms every `ARTIFACT_SECONDS`."""
        self._tell(event)

    def begin(self) -> None:
        """Shows all rungs as they stand, and where the reports will be."""
        self._try(self._begin)

    def stage_done(self, position: int, name: str) -> None:
        """Brings the table up to date, writes the rung's page, and links to the file to ship."""
        self._progress = None
        self._try(self._update_table)
        self._try(self._write_page, position, name)

    def stage_failed(self, position: int, name: str, error: BaseException) -> None:
        """Brings the table up to date, and says on the rung's page why, and how to go on."""
        self._try(self._update_table)
        if isinstance(error, Exception):
            self._try(self._write_failure, position, name, error)

    def _begin(self) -> None:
        from prefect.artifacts import create_link_artifact, create_table_artifact

        folder = (self._store.reports / self._run_id).resolve()
        made = create_table_artifact(
            self._rows(),
            key=self._key("table"),
            description=f"The rungs of {self._run_id}. Accuracies in percent, drop against FP32 in "
            f"points. More columns: `bitladder report {self._run_id}`",
        )
        self._table = cast("UUID", made)  # its type has the coroutine of another use
        create_link_artifact(
            folder.as_uri(), str(folder), key=self._key("reports"), description=f"Reports. {_LOCAL}"
        )

    def _update_table(self) -> None:
        if self._table is not None:
            _update(self._table, data=json.dumps(self._rows()))

    def _rows(self) -> list[dict[str, str]]:
        from ..pipeline.report import people, text_rows

        shown = people(self._frame())
        return text_rows(shown[[column for column in _TABLE if column in shown]])

    def _write_page(self, position: int, name: str) -> None:
        from prefect.artifacts import create_link_artifact, create_markdown_artifact

        from ..pipeline.report import people, text_rows

        frame = self._frame().iloc[[position]]
        row: dict[str, Any] = frame.iloc[0].to_dict()
        shown = text_rows(people(frame))[0]
        page = rung_page(f"{self._run_id}: {name}", shown, row)
        words = (str(position + 1), name)
        create_markdown_artifact(page, key=self._key(*words), description=in_short(name, shown))
        file = (self._store.stages / pack_spec(row["key"]).key / PACKED).resolve()
        if file.is_file():
            create_link_artifact(
                file.as_uri(),
                str(file),
                key=self._key(*words, "file"),
                description=f"{name}, the file to ship. {_LOCAL}",
            )

    def _write_failure(self, position: int, name: str, error: Exception) -> None:
        from prefect.artifacts import create_markdown_artifact

        page = failure_page(
            f"{self._run_id}: {name}", error, resume_command(self._store, self._run_id)
        )
        create_markdown_artifact(
            page,
            key=self._key(str(position + 1), name),
            description=f"{name} stopped: {_cause(error)}",
        )

    def _frame(self) -> Any:
        from ..pipeline.report import accuracy_report

        return accuracy_report(self._store, self._run_id)

    def _show(self, event: Event) -> None:
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact

        self._try(lambda: get_run_logger().info(describe(event)))
        if event.kind == "started":
            self._try(self._update_table)
            key = self._key(str(event.position + 1), event.stage, "progress")
            self._progress = self._try(
                create_progress_artifact, 100 * event.fraction, key=key, description=heading(event)
            )
        elif event.kind in ("step", "epoch", "finished", "failed") and self._progress is not None:
            # what failed keeps its share: the event does not know it
            share = {} if event.kind == "failed" else {"data": 100 * event.fraction}
            self._try(_update, self._progress, description=describe(event), **share)

    def _key(self, *words: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", "-".join([self._run_id, *words]).lower()).strip("-")

    def _try(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if not self._works:
            return None
        try:
            return call(*args, **options)
        except Exception as error:
            self._works = False  # for good: each further call would wait for a dead server
            log.warning("Prefect takes no artifacts (%s); the ladder goes on", error)
            return None


def rung_page(title: str, shown: dict[str, str], row: dict[str, Any]) -> str:
    """A finished rung as Markdown.

    Args:
        shown: its row as `pipeline.report.people` has it.
        row: the same with all columns, accuracies as fractions.
    """
    facts = {_LABELS.get(name, name): text for name, text in shown.items() if text}
    further = ("model", "device", "key", "note")
    facts |= {name: row[name] for name in further if isinstance(row[name], str)}
    stage = facts.pop("stage")
    table = [f"| | {_cell(stage)} |", "|---|---|"]  # a table's head: Prefect draws an empty one too
    table += [f"| {name} | {_cell(text)} |" for name, text in facts.items()]
    return "\n".join([f"## {title}", *_headline(shown), "", *table, ""])


def in_short(name: str, shown: dict[str, str]) -> str:
    """What Prefect's list of artifacts has room for beside a rung's page: some 35 letters."""
    facts = {"test %": "% right", "size kB": "kB"}
    told = [f"{shown[column]} {unit}" for column, unit in facts.items() if shown[column]]
    return f"{name}: {', '.join(told)}" if told else name


def failure_page(title: str, error: Exception, resume: str) -> str:
    """Why a rung stopped and how to go on, as Markdown.

    Args:
        resume: the command that goes on with the ladder.
    """
    hint = error.hint if isinstance(error, StageError) else ""
    quoted = [f"> {line}" for line in _cause(error).splitlines()]
    way_out = [_sentence(hint) or "What is done is kept.", "", "Go on with:"]
    lines = [f"## {title} stopped", "", *quoted, "", *way_out, "", "```", resume, "```", ""]
    return "\n".join(lines)


def _cause(error: Exception) -> str:
    return error.cause if isinstance(error, StageError) else str(error) or type(error).__name__


def _headline(shown: dict[str, str]) -> list[str]:
    if not shown["test %"]:
        return []
    text = f"**{shown['test %']} %** of the test images are classified right"
    if shown["drop"] and shown["W"] != "32":
        text += f", {_against_fp32(shown['drop'])}"
    if shown["size kB"]:
        text += f"; the packed file has **{shown['size kB']} kB**"
    return ["", f"{text}."]


def _against_fp32(drop: str) -> str:
    sign, points = drop[0], drop[1:]
    if float(points) == 0:
        return "as many as in FP32"
    return f"{points} points {'below' if sign == '+' else 'above'} FP32"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _update(artifact: UUID, **values: Any) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import ArtifactUpdate

    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, ArtifactUpdate(**values))
