"""What ladders left, as objects for a notebook: pandas tables, matplotlib figures, networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .derived import pack_spec
from .errors import ConfigError, StoreError
from .history import epochs_of
from .record import PACKED, StageRecord
from .report import note_lines, people, plain_table, reports, write_report
from .run import Run
from .store import DEFAULT_STORE, Store

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn

    from .figures import Drawn

FORMS = {
    ".html": "html",
    ".csv": "csv",
    ".json": "json",
    ".md": "markdown",
    ".parquet": "parquet",
    ".txt": "table",
}


class Report:
    """One ladder of a store, or several side by side; the newest by default.

    Nothing is read before it is asked for. What was read is kept: to see more of a ladder that is
    still running, make another.

    Attributes:
        store: where they are.
        runs: the ladders.
    """

    def __init__(self, store: Store | Path | str = DEFAULT_STORE, *runs: str) -> None:
        """Finds ladders by id, prefix or name.

        Raises:
            StoreError: there is no such ladder.
        """
        self.store = store if isinstance(store, Store) else Store(store)
        self.runs: tuple[Run, ...] = tuple(self.store.run(name) for name in runs or (None,))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per stage, all columns; accuracies are fractions, FP32 counts as 32 bits."""
        return reports(self.store, self.runs)

    @property
    def table(self) -> pd.DataFrame:
        """The columns that people look at first, as text: percent, kB, seconds."""
        return people(self.frame)

    @cached_property
    def epochs(self) -> pd.DataFrame:
        """One row per epoch of every stage, unfinished ones included: losses, accuracies, speed."""
        import pandas as pd

        rows = [
            {**place, **{name: value for name, value in line.items() if name != "scales"}}
            for place, line in self._lines()
        ]
        return pd.DataFrame(rows, columns=None if rows else ["run", "stage", "epoch"])

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The step size of every quantizer after each epoch: run, stage, epoch, quantizer, scale.

        A quantizer is named by its layer and place, as in `layer1.0.conv1.weight`. Of several
        scale groups it is the largest. Full-precision stages have none.
        """
        import pandas as pd

        columns = ["run", "stage", "epoch", "quantizer", "scale"]
        rows = [
            {**place, "epoch": line["epoch"], "quantizer": name, "scale": scale}
            for place, line in self._lines()
            for name, scale in line.get("scales", {}).items()
        ]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per quantized layer of every finished stage: bits, scales, levels, clipping."""
        import pandas as pd

        rows = [
            {"run": run.run, "stage": stage["name"], **layer}
            for run in self.runs
            for stage in run.stages
            if (record := self.store.read(str(stage["key"]))) is not None
            for layer in record.metrics.get("layers", ())
        ]
        return pd.DataFrame(rows, columns=None if rows else ["run", "stage", "layer"])

    @cached_property
    def figures(self) -> Mapping[str, Figure]:
        """Every figure by its name, drawn when it is asked for; notebooks show them."""
        from .figures import drawn

        return _Figures({each.name: each for each in drawn(self.store, self.runs)})

    @property
    def stages(self) -> list[str]:
        """The names of the stages in ladder order; of several runs behind the run's id."""
        several = len(self.runs) > 1
        return [
            f"{run.run}/{stage['name']}" if several else str(stage["name"])
            for run in self.runs
            for stage in run.stages
        ]

    def record(self, stage: str) -> StageRecord:
        """All that is known of a finished stage: spec, files, hardware, versions, metrics.

        Args:
            stage: one of `stages`.

        Raises:
            ConfigError: there is no such stage.
            StoreError: it is not finished.
        """
        keys = [str(planned["key"]) for run in self.runs for planned in run.stages]
        places = dict(zip(self.stages, keys, strict=True))
        if stage not in places:
            raise ConfigError([f"there is no stage {stage!r}; there are: {', '.join(places)}"])
        return self._found(stage, places[stage])

    def packed(self, stage: str) -> Path:
        """The file to ship of a finished stage, as it lies in the store.

        Raises:
            ConfigError, StoreError: as `record`.
        """
        key = pack_spec(self.record(stage).key).key
        return self.store.stages / self._found(f"pack of {stage}", key).key / PACKED

    def _found(self, stage: str, key: str) -> StageRecord:
        record = self.store.find(key)
        if record is None:
            raise StoreError(f"stage {stage!r} has no result yet: {self.store.state(key)[0]}")
        return record

    def network(self, stage: str, device: str = "cpu") -> nn.Module:
        """The trained network of a finished stage, quantizers and all, in eval mode.

        Raises:
            ConfigError, StoreError: as `record`.
        """
        import torch

        from .network import load_network

        return load_network(self.store, self.record(stage), torch.device(device))

    def save(self, path: Path | str) -> Path:
        """Writes the report to a file in the format of its ending, whole or not at all.

        Raises:
            ConfigError: an ending that is none of .html, .csv, .json, .md, .parquet and .txt.
        """
        path = Path(path)
        if path.suffix not in FORMS:
            raise ConfigError([f"{path}: its ending is none of {', '.join(FORMS)}"])
        return write_report(self.frame, FORMS[path.suffix], path, self.store, self.runs)

    def _lines(self) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        """Lines of metrics.jsonl with the run and the stage that they are of."""
        for run in self.runs:
            for stage in run.stages:
                place = {"run": run.run, "stage": str(stage["name"])}
                for line in epochs_of(self.store, str(stage["key"])):
                    yield place, line

    def __repr__(self) -> str:
        return plain_table(self.frame)

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, and what is to be said of its rows."""
        from html import escape

        title = escape(", ".join(run.run for run in self.runs))
        notes = "".join(f"<li>{escape(line)}</li>" for line in note_lines(self.frame))
        table = self.table.to_html(index=False, border=0)
        return f"<p><strong>{title}</strong></p>{table}{f'<ul>{notes}</ul>' if notes else ''}"


class _Figures(Mapping[str, "Figure"]):
    """Figures by name; each is drawn once, when it is first asked for."""

    def __init__(self, drawn: Mapping[str, Drawn]) -> None:
        self._drawn = drawn
        self._done: dict[str, Figure] = {}

    def __getitem__(self, name: str) -> Figure:
        if name not in self._done:
            self._done[name] = self._drawn[name].draw()
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._drawn)

    def __len__(self) -> int:
        return len(self._drawn)

    def __repr__(self) -> str:
        return f"figures: {', '.join(self._drawn)}"
