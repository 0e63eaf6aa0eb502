"""Runs stages that are derived from a finished ladder's: exports, timings."""

from __future__ import annotations

from .auto_plan import plan_so_far
from .config_load import parse_config
from .events import Event
from .interruption import Interruption
from .record import StageRecord
from .run import Run
from .runner import Ladder, found_or_made
from .spec import Plan, PlannedStage, StageSpec
from .store import Store


def derive(run: Run, name: str, spec: StageSpec, store: Store) -> StageRecord:
    """Runs a stage that is derived from a ladder's, or hands back what it left before.

    Args:
        name: of the ladder's stage, for messages.

    Raises:
        StageError: it failed.
        Interrupted: a stop was asked for.
    """
    config = plan_so_far(parse_config(run.config), store.read).config  # with the rungs of `auto`
    position = next(i for i, stage in enumerate(run.stages) if stage["name"] == name)
    trained = StageSpec.from_dict(run.stages[position]["spec"])
    stage = PlannedStage(name, position, trained, teacher=None, parent=None)
    ladder = Ladder(Plan(run.name, (stage,), config), store, _ignore, finished=False)
    with Interruption() as stop:
        return found_or_made(ladder, stage, spec, stop)[0]


def _ignore(_: Event) -> None:
    """Nobody listens."""
