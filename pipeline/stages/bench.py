"""Time a packed network on this machine."""

from __future__ import annotations

from dataclasses import asdict

import torch

from ..bench import bench
from ..files import write_json
from ..packed_file import read_packed
from ..record import PACKED, SPEEDS
from .base import STAGES, StageContext, StageOutput


@STAGES.register("bench")
def time_packed(context: StageContext) -> StageOutput:
    """Times the network in every runtime that is installed, in turns with its float32 original."""
    record, options = context.parents["packed"], context.spec.options
    file = context.store.stages / record.key / PACKED
    packed = read_packed(file, trust={record.network["name"]})
    threads = torch.get_num_threads()
    torch.set_num_threads(options["threads"])
    try:
        found = bench(
            packed,
            batches=options["batches"],
            after_round=lambda done, all_: context.around.notify(kind="step", fraction=done / all_),
        )
    finally:
        torch.set_num_threads(threads)
    facts = {**asdict(found), "versions": options["versions"]}
    write_json(context.around.workdir / SPEEDS, facts)
    return StageOutput((SPEEDS,), record.network, facts)
