"""Batch norm re-estimated on images as they are, and on images augmented as in training.

    python benchmarks/batch_norm_images.py --store artifacts digits
    python benchmarks/batch_norm_images.py --store build/cifar10 cifar10-cpu-plain

For every rung of the runs: validation accuracy of its network with batch norm re-estimated on its
training images, in as many batches as its config says. Nothing in the store is changed. Prints
Markdown; takes seconds a rung.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bitladder.pipeline.config import RunConfig
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.evaluate import evaluate
from bitladder.pipeline.fit import EVALUATION_BATCH
from bitladder.pipeline.network import load_network
from bitladder.pipeline.record import StageRecord
from bitladder.pipeline.runner import data_of
from bitladder.pipeline.store import Store
from bitladder.quant import reestimate_batch_norm
from timing import where_and_how

CPU = torch.device("cpu")


def main() -> None:
    """Prints a table for each run."""
    args = parse_arguments()
    store = Store(args.store)
    print(where_and_how())
    for name in args.runs:
        run = store.run(name)
        config = parse_config(run.config)
        print(f"\n{run.run}, {config.data.name}, validation top-1 %\n")
        print("| rung | images as they are | augmented | difference |\n|---|---|---|---|")
        for planned in run.stages:
            record = store.read(planned["key"])
            if record is None:
                continue
            plain, augmented = (top1(store, record, config, augment) for augment in (False, True))
            print(
                f"| {planned['name']} | {plain:.2f} | {augmented:.2f} | {augmented - plain:+.2f} |",
                flush=True,
            )


def top1(store: Store, record: StageRecord, config: RunConfig, augment: bool) -> float:
    """Validation accuracy in % of a rung whose batch norm is re-estimated."""
    network, data = load_network(store, record, CPU), data_of(config.data)
    batches = data.train.calibration(
        config.data.batch_size,
        record.spec.options["stage"]["train"]["batch_norm_batches"],
        seed=config.seed,
        augment=augment,
        device=CPU,
    )
    reestimate_batch_norm(network, batches)
    images = data.validation.evaluation_batches(EVALUATION_BATCH, device=CPU)
    return 100 * evaluate(network, images).top1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="names of runs, or of their configs")
    parser.add_argument("--store", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
