import pytest
import torch
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.pipeline.store import Store
from tiny_ladder import TINY


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    """A config of three short rungs; `tiny(ladder=[...])` changes its sections."""

    def make(**changes):
        return parse_config({**TINY, **changes})

    return make


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts")


class Events(list):
    """A listener that remembers; `events.trained` are the names of stages that really ran."""

    def __call__(self, event):
        self.append(event)

    @property
    def trained(self):
        return [event.stage for event in self if event.kind == "finished"]


@pytest.fixture
def events():
    return Events()


def _run(config, store, listener=lambda event: None):
    """Runs a ladder to its end."""
    return run_ladder(open_ladder(config, store, listener))


@pytest.fixture
def run():
    return _run
