"""The accuracy report: one table of a run, or of several, as pandas, text, or a file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .auto_ladder import recorded_course
from .derived import differs_too_much
from .errors import ConfigError
from .figures import Drawn, drawn, rows_of
from .figures.style import FORMS as FIGURE_FORMS
from .figures.style import save
from .files import write_atomic
from .forked import results_of
from .history import last_epoch
from .page import ladder_page
from .record import MANIFEST
from .run import Run
from .spec import model_text
from .store import Store
from .store_index import STAGE_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["table", "csv", "json", "markdown", "html", "parquet"]
FORMATS: tuple[str, ...] = get_args(Format)
# written when a ladder ends; `bitladder report` writes any of them again
REPORTS: dict[str, Format] = {"report.csv": "csv", "report.json": "json", "report.md": "markdown"}

COLUMNS = (
    "run",
    "stage",
    "position",
    "state",
    "model",
    "weight_bits",
    "activation_bits",
    "weight_quantizer",
    "activation_quantizer",
    "teacher",
    "parent",
    "epochs",
    "seed",
    "train_loss",
    "val_top1",
    "test_top1",
    "test_top5",
    "deployed_top1",
    "flips",
    "fp32_top1",
    "drop",
    "max_levels",
    "weight_levels",
    "activation_levels",
    "ideal_bytes",
    "packed_bytes",
    "compression",
    "bitops",
    "seconds",
    "images_per_second",
    "device",
    "key",
    "sha256",
    "created",
    "error",
    "note",
)


def accuracy_report(store: Store, run: Run | str | None = None) -> pd.DataFrame:
    """One row per stage in ladder order; accuracies are fractions, FP32 counts as 32 bits.

    Args:
        run: a run, its id, a prefix, or a name; the newest by default.

    Raises:
        StoreError: there is no such run.
    """
    return reports(store, [run if isinstance(run, Run) else store.run(run)])


def reports_current(store: Store, run: Run) -> bool:
    """Whether the reports that a ladder leaves are there, and newer than all its stages."""
    try:
        newest = max(
            (store.stages / key / MANIFEST).stat().st_mtime for key in (*run.trained, *run.packed)
        )
        folder = store.reports / run.run
        return all((folder / name).stat().st_mtime >= newest for name in REPORTS)
    except FileNotFoundError:
        return False


def reports(store: Store, runs: Sequence[Run]) -> pd.DataFrame:
    """The reports of several runs under each other, told apart by the column `run`."""
    import pandas as pd

    rows = [row for run in runs for row in _rows(store, run)]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs["speeds"] = [row for run in runs for row in _speeds(store, run)]
    for name, kind in {**STAGE_COLUMNS, "position": int}.items():
        if kind is int:
            frame[name] = frame[name].astype("Int64")  # whole numbers stay whole beside nulls
        elif kind is float:
            frame[name] = frame[name].astype("float64")
    for name in ("fp32_top1", "drop"):
        frame[name] = frame[name].astype("float64")
    return frame


def _rows(store: Store, run: Run) -> list[dict[str, Any]]:
    rows = store.results(run)
    models = [model_text(planned["spec"]["options"]["model"]) for planned in run.stages]
    names = {planned["key"]: planned["name"] for planned in run.stages}
    fp32: dict[str, float | None] = {}  # of each network, its first full-precision rung's
    for row, model in zip(rows, models, strict=True):
        if row["weight_bits"] == row["activation_bits"] == 32:
            fp32.setdefault(model, row["test_top1"])
    for row, planned, model in zip(rows, run.stages, models, strict=True):
        row["model"] = model
        if row["teacher_chosen"] is not None:
            row["teacher"] = f"best: {names.get(row['teacher_chosen'], row['teacher_chosen'])}"
        if row["weight_bits"] is None:  # not finished: say what it is to become
            stage = planned["spec"]["options"]["stage"]
            last = last_epoch(store, row["key"])
            row |= {name: stage[name] for name in ("weight_bits", "activation_bits")}
            row |= {"train_loss": last.get("train_loss"), "val_top1": last.get("val_top1")}
            row |= {"epochs": last.get("epoch", 0), "seed": run.config.get("seed")}
            for half, choice in stage.get("quantizer", {}).items():
                row[f"{half}_quantizer"] = choice["name"] if stage[f"{half}_bits"] != 32 else None
        row["note"] = None
        own = row["fp32_top1"] = fp32.get(model)
        known = own is not None and row["test_top1"] is not None
        row["drop"] = own - row["test_top1"] if known else None
    if (course := recorded_course(run, store.read)) is not None:
        for row, rung, note in zip(rows, course.rungs, course.notes, strict=False):
            row["note"] = note if note and row["stage"] == rung.name else None
    for row, key in zip(rows, run.packed, strict=True):
        packed = store.read(key)
        if packed is not None and (problem := differs_too_much(packed.metrics)):
            row["note"] = "; ".join(filter(None, (row["note"], problem)))
    return rows


def _speeds(store: Store, run: Run) -> list[dict[str, str]]:
    """What `bitladder bench` found of a run's packed networks, as text for people.

    Of what was measured again, with another version or not, it is the last.
    """
    names = dict(zip(run.packed, (str(stage["name"]) for stage in run.stages), strict=True))
    found = {}
    for record in store.of_kind("bench"):
        packed = record.spec.parents["packed"]
        machine = "{machine}, {threads} threads".format(**record.spec.options)
        for speed in record.metrics["speeds"] if packed in names else ():
            runtime, batch = speed["runtime"], speed["batch"]
            row = {"run": run.run, "stage": names[packed], **speed_row(speed), "machine": machine}
            row["version"] = record.metrics.get("versions", {}).get(runtime.split(",")[0], "")
            found[packed, runtime, batch, machine] = row
    return list(found.values())


def speed_row(speed: Mapping[str, Any]) -> dict[str, str]:
    """A measured speed (see `bench.Speed`) as text for people."""
    return {
        "runtime": speed["runtime"],
        "batch": str(speed["batch"]),
        "ms": f"{1e3 * speed['seconds']:.2f}",
        "10-90 %": f"{1e3 * speed['low']:.2f}-{1e3 * speed['high']:.2f}",
        "images/s": f"{speed['batch'] / speed['seconds']:.0f}",
        "FP32 ms": f"{1e3 * speed['float_seconds']:.2f}",
        "times": f"{speed['ratio']:.2f}",
        "layers in": ", ".join(f"{n} {kind}" for kind, n in speed["kernels"].items()),
    }


def render(
    frame: pd.DataFrame, form: str, store: Store | None = None, runs: Sequence[Run] = ()
) -> bytes:
    """The report as the bytes of a file.

    Args:
        store: from which the page of `html` draws what it shows of these runs beside the table.

    Raises:
        ConfigError: unknown format, or the package that a format needs is not installed.
    """
    if form == "table":
        return (plain_table(frame) + "\n").encode()
    if form == "csv":
        return frame.to_csv(index=False, lineterminator="\n").encode()
    if form == "json":
        # not pandas' own: it drops the last digits of a float
        return (json.dumps(rows_of(frame), indent=1, allow_nan=False) + "\n").encode()
    if form == "markdown":
        table = people(frame).to_markdown(index=False, disable_numparse=True)
        notes = [f"- {line}" for line in note_lines(frame)]
        speeds = speed_table(frame).to_markdown(index=False, disable_numparse=True)
        below = ["", speeds] if frame.attrs.get("speeds") else []
        return "\n".join([table, *([""] if notes else []), *notes, *below, ""]).encode()
    if form == "html":
        texts: dict[str, Any] = {
            "shown": people(frame),
            "notes": note_lines(frame),
            "speeds": speed_table(frame),
        }
        return ladder_page(store, runs, frame, **texts).encode()
    if form == "parquet":
        buffer = io.BytesIO()
        try:
            frame.to_parquet(buffer, index=False)
        except ImportError:
            message = "parquet needs pyarrow; install it with: pip install 'bitladder[parquet]'"
            raise ConfigError([message]) from None
        return buffer.getvalue()
    known = ", ".join((*FORMATS, *FIGURE_FORMS))
    raise ConfigError([f"unknown report format {form!r}; known: {known}"])


def write_report(
    frame: pd.DataFrame, form: str, path: Path, store: Store | None = None, runs: Sequence[Run] = ()
) -> Path:
    """Writes the report to a file, whole or not at all; arguments as of `render`."""
    data = render(frame, form, store, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return path


def write_figures(store: Store, runs: Sequence[Run], form: str, folder: Path) -> list[Path]:
    """Writes each figure of some runs to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    shown = list(drawn(store, runs))
    files = results_of([partial(_file, each, form) for each in shown])
    for each, data in zip(shown, files, strict=True):
        path = folder / f"{each.name}.{form}"
        write_atomic(path, data)
        written.append(path)
    return written


def _file(each: Drawn, form: str) -> bytes:
    return save(each.draw(), form)


def plain_table(frame: pd.DataFrame) -> str:
    """The table for people; a single run's id stands above it, several have a column."""
    runs = list(dict.fromkeys(frame["run"]))
    table = "\n".join([people(frame).to_string(index=False), *note_lines(frame)])
    return f"{runs[0]}\n{table}" if len(runs) == 1 else table


def speed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The speeds of packed networks that were measured, as text; empty where none was.

    "times" is how many times as fast as float32 in the same runtime.
    """
    import pandas as pd

    rows = frame.attrs.get("speeds", [])
    several = frame["run"].nunique() > 1
    return pd.DataFrame([{k: v for k, v in row.items() if several or k != "run"} for row in rows])


def note_lines(frame: pd.DataFrame) -> list[str]:
    """What automatic ladders did and why, a line a rung that there is something to say of."""
    several = frame["run"].nunique() > 1
    return [
        f"{row['run'] + ', ' if several else ''}{row['stage']}: {row['note']}"
        for row in frame[frame["note"].notna()].to_dict("records")
    ]


def people(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that people look at first, as text: percent, kB, seconds."""
    import pandas as pd

    def text(column: str, form: str, factor: float = 1.0) -> list[str]:
        values = frame[column]
        return ["" if pd.isna(v) else format(float(v) * factor, form) for v in values]

    several = frame["run"].nunique() > 1
    drop = ["" if pd.isna(v) else f"{100 * v:+.2f}" for v in frame["drop"]]
    rows: list[dict[Any, Any]] = frame.to_dict("records")
    columns = {
        **({"run": list(frame["run"])} if several else {}),
        "stage": list(frame["stage"]),
        "state": list(frame["state"]),
        **({"model": list(frame["model"])} if frame["model"].nunique() > 1 else {}),
        "W": text("weight_bits", ".0f"),
        "A": text("activation_bits", ".0f"),
        "quantizer": [_pair(r) for r in rows],
        "teacher": [_text(v) for v in frame["teacher"]],
        "epochs": text("epochs", ".0f"),
        "val %": text("val_top1", ".2f", 100),
        "test %": text("test_top1", ".2f", 100),
        "drop": drop,
        "levels": [_levels(r) for r in rows],
        "packed %": text("deployed_top1", ".2f", 100),
        "size kB": text("packed_bytes", ".1f", 1e-3),
        "ideal kB": text("ideal_bytes", ".1f", 1e-3),
        "ratio": text("compression", ".1f"),
        "Gbitops": text("bitops", ".3f", 1e-9),
        "seconds": text("seconds", ".1f"),
    }
    return pd.DataFrame(columns)


def text_rows(shown: pd.DataFrame) -> list[dict[str, str]]:
    """A table of text, such as that of `people`, row by row."""
    return [{str(k): str(v) for k, v in row.items()} for row in shown.to_dict("records")]


def _pair(row: dict[Any, Any]) -> str:
    names = [_text(row["weight_quantizer"]), _text(row["activation_quantizer"])]
    if names[0] == names[1]:
        return names[0]
    return " / ".join(name or "-" for name in names)


def _levels(row: dict[Any, Any]) -> str:
    """Distinct codes in the fullest scale group, weights / activations."""
    import pandas as pd

    found = [row["weight_levels"], row["activation_levels"]]
    if all(pd.isna(v) for v in found):
        return ""
    return " / ".join("-" if pd.isna(v) else str(int(v)) for v in found)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
