import shutil

import pytest
from bitladder.flows.launch import launch
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import StageError
from bitladder.pipeline.store import Store


def test_a_store_that_is_gone_does_not_hide_why_the_ladder_stopped(tmp_path):
    config = parse_config(
        {
            "name": "tiny",
            "model": "tiny_convnet",
            "train": {"epochs": 1},
            "ladder": [{"weight_bits": 32, "activation_bits": 32}],
        }
    )
    store = Store(tmp_path / "artifacts")

    def lose_the_store(event):
        if event.kind == "started":
            shutil.rmtree(store.reports)
            (store.root / "results.db").unlink()
            raise StageError("fp32", "the disk is gone")

    with pytest.raises(StageError, match="the disk is gone"):
        launch(config, store, runner="plain", listener=lose_the_store)
