"""`bitladder evaluate` and `verify`: what was recorded, measured again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from math import isinf
from pathlib import Path
from typing import Any

from rich.table import Table

from ..pipeline.derived import pack_spec
from ..pipeline.errors import ConfigError, StoreError
from ..pipeline.resume_command import resume_command
from ..pipeline.run import Run
from ..pipeline.store import Store
from .tables import print_rows, print_table, table_of

# what a terminal too narrow for the layers does without, the first one first
_LESS_OF_LAYERS = ("quantizer", "bits", "clip range", "scale")


def evaluate_file(file: Path, source: str | None, overrides: Sequence[str]) -> None:
    """`bitladder evaluate` of a packed or exported file."""
    from ..pipeline.config_load import load_config
    from ..pipeline.evaluate_stage import evaluate_shipped

    if source is None:
        raise ConfigError([f"say on which data: bitladder evaluate {file} --config digits"])
    found = evaluate_shipped(file, load_config(source, overrides))
    print(f"{file}: test top-1 {100 * found.top1:.2f} %, {found.images} images")


def evaluate_run(name: str | None, stage: str | None, store: Store) -> None:
    """`bitladder evaluate`."""
    from ..pipeline.evaluate_stage import evaluate_stage

    run = store.run(name)
    names = [str(s["name"]) for s in run.stages]
    if stage is not None and stage not in names:
        raise ConfigError([f"no stage {stage!r} in {run.run}; there are: {', '.join(names)}"])
    found, damaged = False, []
    for planned in run.stages:
        if stage not in (None, planned["name"]):
            continue
        key = str(planned["key"])
        record = store.find(key)
        if record is None:
            if (store.stages / key).is_dir():
                damaged.append(f"{planned['name']} is not used: {store.problem(key)}")
            continue
        found = True
        result = evaluate_stage(store, run, record)
        recorded = record.metrics["test_top1"]
        print(
            f"{planned['name']}: test top-1 {100 * result.accuracy.top1:.2f} % "
            f"(recorded {100 * recorded:.2f} %), top-5 {100 * result.accuracy.top5:.2f} %, "
            f"{result.accuracy.images} images"
        )
        if result.layers:
            _print_layers(result.layers)
        packed = store.find(pack_spec(key).key)
        if packed is not None:
            print_table(_costs(packed.metrics))
    if damaged:
        way_out = f"redo it with: {resume_command(store, run.run)}"
        raise StoreError("\n".join([*damaged, way_out]), exit_code=1)
    if not found:
        raise StoreError(f"{stage or 'no stage'} of {run.run} is {'not ' if stage else ''}done yet")


def _print_layers(layers: Sequence[dict[str, Any]]) -> None:
    numbers = ("bits", "scale", "clip range", "levels", "clip %", "SQNR dB")
    print_rows(list(_layers(layers)), right=numbers, dispensable=_LESS_OF_LAYERS)


def _layers(layers: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """What the quantizers of each layer do, a row for its weight and one for its input."""
    for layer in layers:
        for half in ("weight", "activation"):
            if layer[f"{half}_quantizer"] is None:
                continue
            sqnr = layer[f"{half}_sqnr_db"]
            yield {
                "layer": layer["layer"],
                "of": half[0].upper(),  # as in the table of costs: W, A
                "quantizer": layer[f"{half}_quantizer"],
                "bits": str(layer[f"{half}_bits"]),
                "scale": f"{layer[f'{half}_scale']:.3g}",
                "clip range": f"{layer[f'{half}_low']:.3g} .. {layer[f'{half}_high']:.3g}",
                "levels": str(layer[f"{half}_levels"]),
                "clip %": f"{100 * layer[f'{half}_clipped']:.2f}",
                "SQNR dB": "none" if sqnr is None or isinf(sqnr) else f"{sqnr:.1f}",
            }


def _costs(metrics: Mapping[str, Any]) -> Table:
    """What each layer costs, and the whole network; see `layer_costs` for the operations."""
    numbers = ("W", "A", "parameters", "bytes", "MMACs", "Gbitops")
    table = table_of(("layer", *numbers), right=numbers)
    for row in metrics["layers"]:
        table.add_row(
            row["layer"],
            str(row["weight_bits"]),
            str(row["activation_bits"]),
            str(row["parameters"]),
            str(row["weight_bytes"]),
            f"{row['macs'] / 1e6:.3f}",
            f"{row['bitops'] / 1e9:.4f}",
        )
    macs, bitops = (sum(row[key] for row in metrics["layers"]) for key in ("macs", "bitops"))
    whole = (str(metrics["parameters"]), str(metrics["packed_bytes"]))
    table.add_row("whole file", "", "", *whole, f"{macs / 1e6:.3f}", f"{bitops / 1e9:.4f}")
    return table


def verify_store(name: str | None, store: Store) -> None:
    """`bitladder verify`."""
    run = store.run(name) if name else None
    if not _files_match(run, store):
        sys.exit(1)
    if run is None:
        print("give a RUN to have its packed and exported networks measured again as well")
        return
    from ..pipeline.verify import verify_networks

    bad = 0
    for found in verify_networks(store, run):
        bad += found.problem is not None
        print(f"{found.stage}: {found.what}: {found.problem or 'ok'}")
    if bad:
        sys.exit(1)


def _files_match(run: Run | None, store: Store) -> bool:
    """Whether every file of a run, or of all, matches its checksum; says which do not."""
    keys = every = store.keys()
    if run is not None:
        looks = [key for key in run.looks if key in every]
        # what cannot be read may be an export of this run: of which it is only it itself says
        unknown = [key for key in every if store.read(key) is None]
        keys = list(dict.fromkeys([*run.trained, *run.packed, *looks, *unknown]))
    if not keys and not store.root.is_dir():
        raise StoreError(f"there is no store {store.root}")
    bad = files = stages = 0
    for key in keys:
        if not (store.stages / key).is_dir():
            print(f"{key}: not done")
            continue
        stages += 1
        problem = store.problem(key)
        if problem is None:
            record = store.read(key)
            files += len(record.files) if record else 0
            continue
        bad += 1
        print(f"{key}: {problem}")
    print(f"{stages} stages, {files} files match their checksums; {bad} damaged")
    if bad:
        print("damaged stages are never used; redo them with bitladder run, resume, export, bench")
    return bad == 0
