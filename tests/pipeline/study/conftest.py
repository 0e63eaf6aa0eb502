import json

import pytest
from bitladder.pipeline.files import sha256_of
from bitladder.pipeline.record import MODEL, StageRecord
from bitladder.pipeline.study import load_study

BASE = {
    "data": {"name": "digits", "batch_size": 128},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 1, "optimizer": {"lr": 0.1}, "calibration_batches": 2},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32, "epochs": 9},
        {"weight_bits": 4, "activation_bits": 8},
        {"weight_bits": 2, "activation_bits": 2, "epochs": 3},
        {"weight_bits": 1, "activation_bits": 2, "epochs": 5},
    ],
}


@pytest.fixture
def study(tmp_path):
    """A study from sections; `overrides` are those of `--set`."""

    def make(overrides=(), **sections):
        raw = {"name": "small", "base": BASE, "seeds": 2, **sections}
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps(raw))  # JSON is YAML
        return load_study(path, overrides)

    return make


@pytest.fixture
def finish(store):
    """Commits a trial's stage without training it."""

    def commit(trial, stage, test, val=0.5, seconds=2.0, images=360):
        planned = {planned.name: planned for planned in trial.plan.stages}[stage]
        if store.read(planned.key):
            return  # by another arm that has it too
        weights = store.workdir(planned.key) / MODEL
        weights.write_bytes(b"none")
        metrics = {"test_top1": test, "val_top1": val, "test_images": images, "seconds": seconds}
        store.commit(
            StageRecord(
                key=planned.key,
                spec=planned.spec,
                parents={},
                files={MODEL: {"sha256": sha256_of(weights), "bytes": 4}},
                network={**planned.spec.options["model"], "num_classes": 10},
                metrics=metrics,
                environment={"device_name": "nothing", "threads": 1, "torch": "0"},
                created="2026-01-01T00:00:00.000000+00:00",
            )
        )

    return commit
