"""A committed stage, measured again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..quant.metrics import layer_report
from .config import RunConfig
from .config_load import parse_config
from .derived import format_of
from .errors import ConfigError
from .evaluate import Accuracy, accuracy, evaluate
from .exported import open_export
from .fit import EVALUATION_BATCH
from .machine import choose_device
from .network import load_network
from .record import StageRecord
from .run import Run
from .runner import data_of
from .runtimes import open_packed
from .store import Store


@dataclass(frozen=True)
class Measured:
    """Accuracy on the test split, and what each layer's quantizers do."""

    accuracy: Accuracy
    layers: list[dict[str, Any]]


def evaluate_shipped(file: Path, config: RunConfig) -> Accuracy:
    """A packed, ONNX or OpenVINO file on the test split of a config's data.

    Raises:
        ConfigError: the file cannot be used, or the data are not there or of another shape.
    """
    data = data_of(config.data)
    if (form := format_of(file)) == "packed":
        opened = open_packed(file, trust={config.model.name})
    else:
        opened = open_export(form, file)
    try:
        return accuracy(opened, data.test.evaluation_batches(EVALUATION_BATCH, device="cpu"))
    except Exception as error:  # each runtime has its own for images of another shape
        message = f"{file} does not take the images of {config.data.name}: {error}"
        raise ConfigError([message]) from None


def evaluate_stage(store: Store, run: Run, record: StageRecord) -> Measured:
    """Loads a stage's network from its file and runs it on the test split.

    Raises:
        ConfigError: the data set is not there.
    """
    config = parse_config(run.config)
    device = choose_device(config.runtime.device)
    threads = record.environment.get("threads")
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)  # other sums of partial sums would round otherwise
    data = data_of(config.data)
    model = load_network(store, record, device)
    found = evaluate(model, data.test.evaluation_batches(EVALUATION_BATCH, device=device))
    stage = record.spec.options["stage"]
    batches = stage["train"].get("calibration_batches")
    if not record.network.get("quantization") or batches is None:
        return Measured(found, [])
    calibration = data.train.calibration(
        config.data.batch_size,
        batches,
        seed=config.seed,
        augment=stage["train"]["augment"],
        device=device,
    )
    return Measured(found, layer_report(model, calibration))
