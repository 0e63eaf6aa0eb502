"""The quantizer that the README adds in one file: it keeps the laws, trains, and is listed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitladder.flows.components import show_components
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.errors import ConfigError
from bitladder.pipeline.runner import open_ladder, run_ladder
from bitladder.quant import QUANTIZERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(
    r"^```python\n(# quant/quantizers/twn\.py\n.*?)^```", README, flags=re.M | re.S
)
LADDER = {
    "name": "example",
    "data": {"name": "digits", "batch_size": 256},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 1, "calibration_batches": 2, "batch_norm_batches": 2},
    "quantizer": {"weight": {"name": "twn", "threshold": 0.5}},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 2, "activation_bits": 2},
    ],
}


@pytest.fixture
def own_file(tmp_path):
    """The example in a file of the user's own, outside of the package, imported."""
    path = tmp_path / "own_quantizer.py"
    path.write_text(EXAMPLE.replace("from ..", "from bitladder.quant."), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("own_quantizer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_quantizer"] = module  # annotations are resolved there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["own_quantizer"]
    del QUANTIZERS._entries["twn"]


def test_a_file_in_the_folder_is_a_quantizer_and_keeps_the_laws(tmp_path):
    # only this one in the copied folder: the others have been through the laws already
    package = tmp_path / "bitladder" / "quant"
    skip = shutil.ignore_patterns("__pycache__", "quantizers")
    shutil.copytree(ROOT / "quant", package, ignore=skip)
    (package / "quantizers").mkdir()
    shutil.copy(ROOT / "quant" / "quantizers" / "__init__.py", package / "quantizers")
    (package / "quantizers" / "twn.py").write_text(EXAMPLE, encoding="utf-8")
    shutil.copytree(
        ROOT / "tests" / "quant", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    options = ("-k", "twn", "-rA", "-p", "no:cacheprovider", "--no-header", "--tb=short")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_laws.py", *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    passed = re.findall(r"^PASSED \S+::(\w+)\[(?:\w+-)?twn[-\]]", ended.stdout, flags=re.M)
    assert {
        "test_training_sees_what_export_stores",
        "test_codes_are_few_and_stored_narrow",
        "test_odd_tensors_stay_finite",
        "test_order_is_kept",
        "test_a_state_dict_loads_strictly_and_gives_the_same_values",
    } <= set(passed)


def test_a_file_of_ones_own_trains_a_rung(own_file, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        records = run_ladder(open_ladder(parse_config(LADDER), tmp_path / "artifacts"))
    finally:
        torch.set_num_threads(before)
    rung = records[-1]
    assert rung.metrics["weight_levels"] == 3
    assert rung.spec.options["stage"]["quantizer"]["weight"] == {"name": "twn", "threshold": 0.5}


def test_its_options_and_widths_are_checked_like_any_other_s(own_file, tmp_path):
    wrong = {**LADDER, "quantizer": {"weight": {"name": "twn", "treshold": 0.5}}}
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        parse_config(wrong)
    four_bits = {**LADDER, "ladder": [LADDER["ladder"][0], {**LADDER["ladder"][1]}]}
    four_bits["ladder"][1]["weight_bits"] = 4
    with pytest.raises(ConfigError, match="three levels: 2 bits, not 4"):
        open_ladder(parse_config(four_bits), tmp_path / "artifacts")


def test_it_is_among_the_components(own_file, capsys):
    show_components("quantizers", None)
    table, sources = capsys.readouterr().out.split("\n\n")
    row = next(line for line in table.splitlines() if line.startswith("twn"))
    assert row.split() == ["twn", "2", "-", "-", "-", "-", "m"]
    assert "Li et al., 2016" in sources
    show_components("quantizers", "twn")
    assert "threshold: float  (default 0.7)" in capsys.readouterr().out


def test_without_its_file_it_is_unknown(tmp_path):
    with pytest.raises(ConfigError, match="unknown quantizer 'twn'"):
        parse_config(LADDER)
