"""`bitladder profile`: where the time of a training step goes."""

from __future__ import annotations

from collections.abc import Sequence

from ..pipeline.config_load import load_config
from ..pipeline.profile import Profile, profile_stage
from .tables import print_table, table_of


def profile_config(source: str, overrides: Sequence[str], stage: str | None, steps: int) -> None:
    """Measures and prints; writes nothing."""
    found = profile_stage(load_config(source, overrides), stage, steps=steps)
    print(_heading(found))
    table = table_of(("part", "ms", "%"), right=("ms", "%"))
    whole = found.data + found.step
    for part, seconds in {"data": found.data, **found.parts, "whole": whole}.items():
        table.add_row(part, f"{1e3 * seconds:.2f}", f"{100 * seconds / whole:.1f}")
    print_table(table)
    for line in _findings(found):
        print(line)


def _heading(found: Profile) -> str:
    stage, machine = found.stage, found.machine
    several = "" if found.teachers == 1 else "s"
    taught = f"{found.teachers} teacher{several}" if found.teachers else "no teacher"
    where = machine["device_name"]
    if machine["device"] == "cpu":
        threads = machine["threads"]
        where = f"{threads} thread{'s' if threads > 1 else ''} of {where}"
    return (
        f"{stage.name}: {found.network} at W{stage.weight_bits}A{stage.activation_bits}, "
        f"{taught}, batch {found.batch_size}; {where}, torch {machine['torch']}"
    )


def _findings(found: Profile) -> list[str]:
    """What the table comes to: speed, and what the rung costs over plain training."""
    lines = [
        f"{found.images_per_second:.0f} images a second: median of {found.steps} steps, the "
        f"slowest {found.slowest / found.step:.2f} times as long",
        f"the FP32 step of the same network alone takes {1e3 * found.fp32:.2f} ms; this one "
        f"{found.step / found.fp32:.2f} times that",
    ]
    if found.compiled is not None:
        lines.append(
            f"compiled, as this rung is trained, its step takes {1e3 * found.compiled:.2f} ms, "
            f"{found.compiled / found.fp32:.2f} times that of FP32; the table is of the plain one"
        )
    return [*lines, *found.notes]
