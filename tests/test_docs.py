"""What the texts say is so: names, commands, code blocks."""

import re
from pathlib import Path

import pytest
from bitladder import quant
from bitladder.flows.__main__ import app
from bitladder.flows.quantizer_pages import overview_row, quantizer_pages
from bitladder.models import MODELS
from bitladder.pipeline.config_load import load_config, parse_config, shipped_configs
from bitladder.pipeline.data import DATASETS
from bitladder.pipeline.losses import FEATURE_LOSSES, LOSSES
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.stages import STAGES
from bitladder.pipeline.study import load_study, shipped_studies
from bitladder.pipeline.yaml_reader import read_yaml
from bitladder.quant.catalogue import catalogue
from bitladder.quant.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


REGISTRIES = [DATASETS, LOSSES, FEATURE_LOSSES, STAGES, QUANTIZERS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.kind)
def test_the_readme_names_every_part(registry):
    assert [name for name in registry if f"`{name}`" not in README] == []


def test_the_readme_names_every_network():
    def named(name):
        family = name.rstrip("0123456789")
        return f"`{name}`" in README or (f"`{family}8`" in README and name[len(family) :] in README)

    assert [name for name in MODELS if not named(name)] == []


def test_the_readme_names_every_command():
    commands = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert [name for name in commands if f"bitladder {name}" not in README] == []


def test_the_readme_names_every_shipped_config():
    assert [name for name in shipped_configs() if f"`{name}`" not in README] == []


def test_the_readme_names_every_shipped_study():
    assert [name for name in shipped_studies() if f"`{name}`" not in README] == []


def test_a_shipped_config_opens_with_its_command():
    for name, path in shipped_configs().items():
        assert path.read_text(encoding="utf-8").startswith(f"# bitladder run {name} ")


def test_the_page_of_quantizers_is_what_the_code_says():
    page = (ROOT / "docs" / "quantizers.md").read_text(encoding="utf-8")
    assert page == quantizer_pages(), "stale; write it anew with `make docs`"


def test_the_readme_s_table_of_quantizers_has_the_widths_of_the_code():
    found = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", README, flags=re.M)
    assert sorted(found) == [overview_row(facts)[:4] for facts in catalogue()]


def test_the_ladders_in_the_readme_load():
    ladders = [text for text in blocks("yaml") if "\nladder:" in text]
    configs = [parse_config(read_yaml(text, "README.md")) for text in ladders]
    assert [len(config.ladder) for config in configs] == [5, 5, 0]
    assert configs[2].auto is not None


def test_the_study_in_the_readme_loads(tmp_path):
    (text,) = [block for block in blocks("yaml") if "\narms:" in block]
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    study = load_study(tmp_path / "study.yaml")
    assert len(study.trials) == 5 * 5 * 5


def test_the_rung_in_the_readme_loads():
    (text,) = [block for block in blocks("yaml") if block.startswith("weight_bits")]
    rungs = [{"weight_bits": 32, "activation_bits": 32}, read_yaml(text, "README.md")]
    rung = parse_config({"name": "readme", "ladder": rungs}).ladder[1]
    assert rung.quantizer.weight.options == {"method": "lsq"}
    assert rung.oscillation.dampens
    assert rung.oscillation.freezes


def test_the_readme_s_quantized_network_works(capsys):
    (code,) = [block for block in blocks("python") if "quantize_model" in block]
    names = {}
    exec(code, names)
    plans = quant.layer_plan(names["model"])
    assert {plan.weight_bits for plan in plans.values()} == {2, 4, 8}
    assert plans["layer4.1.conv2"].weight[0].name == "apot"
    assert names["model"](names["images"]).isfinite().all()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:]] == list(plans)


def test_the_readme_s_imports_work():
    code = "\n".join(blocks("python"))
    imports = [line for line in code.splitlines() if line.startswith("from bitladder")]
    assert imports
    exec("\n".join(imports), {})


def test_the_output_in_the_readme_is_that_of_the_shipped_ladder():
    assert f"\n{make_plan(load_config('digits')).run}\n" in README
