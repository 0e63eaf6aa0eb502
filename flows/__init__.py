"""Entry points: the command line, and the same as Python functions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from ..pipeline.config import RunConfig


def ladder(
    config: RunConfig | str | Path, *, store: str | Path = "artifacts", runner: str = "prefect"
) -> pd.DataFrame:
    """Runs a ladder, or what is left of it, and gives back its accuracy report.

    Args:
        config: a shipped config by name, a YAML file, or a checked config.
        runner: "prefect", or "plain" for the same without Prefect.

    Raises:
        ConfigError, StageError, Interrupted, StoreError: as `bitladder run` would say them.
    """
    from ..pipeline.config import RunConfig
    from ..pipeline.config_load import load_config
    from ..pipeline.report import accuracy_report
    from ..pipeline.store import Store
    from .launch import launch

    checked = config if isinstance(config, RunConfig) else load_config(config)
    opened = Store(store)
    return accuracy_report(opened, launch(checked, opened, runner=runner, listener=lambda _: None))


def study(
    source: str | Path,
    *,
    store: str | Path = "artifacts",
    runner: str = "processes",
    workers: int | None = None,
    address: str | None = None,
) -> pd.DataFrame:
    """Runs a study, or what is left of it, and gives back a row per trial and stage.

    Args:
        source: a shipped study by name, or a YAML file.
        runner: "processes", "dask" or "ray".
        workers: trials at a time; by default one for each core, on a GPU one.
        address: of a Dask or Ray cluster that runs; by default one on this machine.

    Raises:
        BitladderError: as `bitladder study` would say it.
    """
    from ..pipeline.store import Store
    from ..pipeline.study import results
    from .study_run import StudyRun, execute, load, raise_failures

    run, opened = StudyRun(str(source), (), runner, workers, address), Store(store)
    loaded = load(run)
    raise_failures(loaded, execute(loaded, run, opened), run.command(opened))
    return results(loaded, opened)
