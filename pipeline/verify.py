"""Whether what a ladder left is what it says: files, packed networks, exports, accuracies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..quant.export.packed import pack_network
from .config_load import parse_config
from .data import DataBundle
from .derived import MOST_FLIPS, pack_spec
from .errors import BitladderError
from .evaluate import evaluate
from .exported import compare
from .fit import EVALUATION_BATCH
from .network import load_network
from .packed_file import read_packed, tensors_of
from .record import PACKED, StageRecord
from .run import Run
from .runner import data_of
from .store import Store


@dataclass(frozen=True)
class Finding:
    """What became of one check.

    Attributes:
        what: of which stage, and what was looked at.
        problem: None where it is as it should be.
    """

    stage: str
    what: str
    problem: str | None = None


def verify_networks(store: Store, run: Run) -> Iterator[Finding]:
    """Measures a ladder's packed and exported networks again, on the CPU.

    A packed file has to hold what packing its checkpoint gives, to the bit; its accuracy may
    differ from the recorded one by a few images, since other machines round otherwise.
    """
    data = data_of(parse_config(run.config).data)
    for planned in run.stages:
        name, trained = str(planned["name"]), store.find(str(planned["key"]))
        packed = store.find(pack_spec(str(planned["key"])).key)
        if trained is None or packed is None:
            yield Finding(name, "packed file", "not there: run the ladder again, which packs it")
            continue
        yield from _packed(name, trained, packed, store, data)
        for export in _exports(store, packed.key):
            yield _export(name, export, packed, store, data)


def _packed(
    name: str, trained: StageRecord, packed: StageRecord, store: Store, data: DataBundle
) -> Iterator[Finding]:
    file = store.stages / packed.key / PACKED
    trust = {trained.network["name"]}
    try:
        model = read_packed(file, trust=trust).model
    except BitladderError as error:
        yield Finding(name, "packed file", str(error))
        return
    again = pack_network(load_network(store, trained, torch.device("cpu"))).tensors
    found = tensors_of(file)
    same = set(again) == set(found) and all(torch.equal(again[k], found[k]) for k in again)
    problem = None if same else "it is not what packing the checkpoint gives"
    yield Finding(name, "packed file against the checkpoint", problem)
    batches = data.test.evaluation_batches(EVALUATION_BATCH, device="cpu")
    top1, recorded = evaluate(model, batches).top1, packed.metrics["deployed_top1"]
    problem = None
    if abs(top1 - recorded) > MOST_FLIPS:
        problem = f"test top-1 is {100 * top1:.2f} %, recorded are {100 * recorded:.2f} %"
    yield Finding(name, f"accuracy of the packed file, {100 * top1:.2f} %", problem)


def _exports(store: Store, packed: str) -> list[StageRecord]:
    return [r for r in store.of_kind("export") if packed in r.spec.parents.values()]


def _export(
    name: str, export: StageRecord, packed: StageRecord, store: Store, data: DataBundle
) -> Finding:
    form = export.metrics["format"]
    what = f"{form} file against the packed file"
    main = next(file for file in export.files if not file.endswith(".bin"))
    if problem := store.problem(export.key):
        return Finding(name, what, problem)
    options = export.spec.options
    try:
        _, problem = compare(
            form,
            store.stages / export.key / main,
            read_packed(store.stages / packed.key / PACKED, trust={packed.network["name"]}),
            lambda: data.test.evaluation_batches(EVALUATION_BATCH, device="cpu"),
            narrow=options["narrow"],
            on_bits=options["batch"] is not None,
        )
    except BitladderError as error:
        problem = str(error)
    return Finding(name, what, problem)
