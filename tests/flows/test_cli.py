"""The commands as a user types them; in this process, but for what needs another one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from bitladder.flows import ladder
from bitladder.pipeline.config_load import load_config
from bitladder.pipeline.derived import pack_spec
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.store import Store
from PIL import Image

TINY = {
    "name": "tiny",
    "data": {"name": "digits", "batch_size": 256},
    "model": {"name": "tiny_convnet"},
    "train": {"epochs": 1, "calibration_batches": 2},
    "ladder": [
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 2, "activation_bits": 2},
    ],
}
# A user's network that sends its own process the signal STOP_WITH in its third training step.
STOPPING = """
import os, signal
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(4, num_classes))
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.steps == 3 and "STOP_WITH" in os.environ:
            signal.raise_signal(int(os.environ.pop("STOP_WITH")))
        return self.layers(x)
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BITLADDER_STORE", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("stopping", "seven"):  # another test's, in another folder
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(config, path="tiny.yaml", **changes):
    Path(path).write_text(yaml.safe_dump({**config, **changes}))
    return path


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    ladder(write(TINY, root / "tiny.yaml"), store=root / "artifacts", runner="plain")
    return root


@pytest.fixture
def store(finished_once, tmp_path):
    """The store of a finished ladder, `tiny.yaml`, in the current folder."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return Store("artifacts")


def key_of(store, stage):
    return next(str(s["key"]) for s in store.run().stages if s["name"] == stage)


def damage(store, stage):
    path = store.stages / key_of(store, stage) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


# -- run, plan ---------------------------------------------------------------------------------


def test_run_prints_the_run_the_table_and_the_path_of_every_file(bitladder):
    code, out, err = bitladder("run", write(TINY), "--runner", "plain", "--store", "here")
    assert code == 0
    store = Store("here")
    lines = out.splitlines()
    assert lines[0] == store.run().run
    assert [line.split()[:2] for line in lines[2:4]] == [["fp32", "done"], ["w2a2", "done"]]
    files = [line for line in lines if line.startswith("here/")]
    assert all(Path(file).is_file() for file in files)
    assert "here/results.db" in files
    assert any(file.endswith(f"{key_of(store, 'w2a2')}/model.safetensors") for file in files)
    assert "1/2 fp32 finished, validation" in err


def test_a_finished_ladder_trains_nothing_and_needs_no_prefect(bitladder, store, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # where nobody answers
    code, out, err = bitladder("run", "tiny.yaml")
    assert code == 0
    assert out.splitlines()[0] == store.run().run
    assert "was there already" in err
    assert "started" not in err


def test_plan_shows_what_a_change_would_redo_and_runs_nothing(bitladder, store):
    before = sorted(Path("artifacts").rglob("*"))
    code, out, _ = bitladder("plan", "tiny.yaml", "--set", "ladder.1.epochs=3")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [(row[0], " ".join(row[6:])) for row in rows] == [("fp32", "done"), ("w2a2", "to do")]
    assert rows[0][2] == key_of(store, "fp32")
    assert sorted(Path("artifacts").rglob("*")) == before


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "bad.yaml: is empty"),
        ("- a\n- b\n", "expected a mapping"),
        ("ladder: [", "bad.yaml:"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("name: a\nname: b\n", "stands on line 1 already"),
        ("a: " + "[" * 5000 + "]" * 5000, "levels deep"),
        ("name: !!python/object/apply:os.mkdir [pwned]\n", "is refused"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
            "aliases written out",
        ),
        ("name: a\nladder: []\n", "ladder: has no stage"),
        ("name: a\nladder: [{weight_bits: 9, activation_bits: 4}]\n", "there is no width 9"),
        ("name: a\nladder: [{weight_bits: 1, activation_bits: 1, quantizer: lsq}]\n", "use uniq"),
        ("name: a\nladder: [{weight_bits: 4, activation_bits: 4}]\nsed: 1\n", "mean 'seed'?"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "bytes",
)
def test_a_bad_config_is_one_message_and_nothing_is_written(bitladder, text, message):
    Path("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = bitladder("run", "bad.yaml")
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert out == ""
    assert os.listdir() == ["bad.yaml"]


def test_all_mistakes_of_a_config_come_at_once(bitladder):
    rungs = [
        {"weight_bits": 32, "activation_bits": "many"},
        {"weight_bits": 2, "activation_bits": 2, "quantizer": {"weight": "lqs"}},
    ]
    write(TINY, data={"name": "digist"}, model={"name": "tiny_net"}, seed="no", ladder=rungs)
    code, _, err = bitladder("run", "tiny.yaml", "--set", "train.epochs=-1")
    assert code == 2
    header, *lines = err.splitlines()
    assert header == "errors:"
    for begin in (
        "seed: ",
        "data: unknown data set 'digist'; did you mean 'digits'?",
        "model: unknown model 'tiny_net'; did you mean 'tiny_convnet'?",
        "train.epochs: ",
        "ladder.0.activation_bits: ",
        "ladder.1.quantizer.weight: unknown quantizer 'lqs'; did you mean 'lsq'?",
    ):
        assert len([line for line in lines if line.startswith(begin)]) == 1, (begin, err)
    assert len(lines) == 6, err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data={name: image_folder, root: nowhere}", "nowhere does not exist. Set data.root"),
        ("data={name: image_folder, root: empty}", "has no class folders"),
        ("data={name: image_folder, root: torn}", "torn/train/a/0.png"),
        ("model={name: 'nowhere.net:make'}", "no module 'nowhere'"),
        ("model={name: 'seven:net'}", "digits has 10 classes"),
        ("model={name: tiny_convnet, weights: torn.pt}", "model.weights: torn.pt cannot be read"),
        ("model={name: tiny_convnet, weights: other.pt}", "do not fit the model"),
        ("runtime.device=abacus", "runtime.device: 'abacus' is not usable here"),
        ("ladder.9.epochs=1", "its last index is 1"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(bitladder, change, message):
    Path("empty").mkdir()
    for split, letter in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        Path("torn", split, letter).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), number).save(Path("torn", split, letter, f"{number}.png"))
    Path("torn/train/a/0.png").write_bytes(b"no image")
    Path("torn.pt").write_bytes(b"junk")
    torch.save({"weight": torch.zeros(3)}, "other.pt")
    Path("seven.py").write_text(
        "from torch import nn\n\ndef net(in_channels, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 7))\n"
    )
    code, _, err = bitladder("run", write(TINY), "--set", change)
    assert code == 2, err
    assert message in err
    assert err.startswith("error: ")
    assert not Path("artifacts").exists()


# -- failure, interruption, resume -------------------------------------------------------------


def test_a_failed_stage_is_named_with_its_cause_and_the_command_that_goes_on(bitladder):
    write(TINY, ladder=[*TINY["ladder"][:1], {**TINY["ladder"][1], "train": {"optimizer": HOT}}])
    code, _, err = bitladder("run", "tiny.yaml", "--runner", "plain", "--store", "a b")
    run = Store("a b").run().run
    assert code == 1
    end = err[err.index("error: ") :]
    assert end.startswith("error: stage 'w2a2' failed: the loss is ")
    assert end.count("the loss is") == 1
    assert end.endswith(
        f"go on after mending the cause with: bitladder resume {run} --store 'a b'\n"
    )
    _, listed, _ = bitladder("list", "--store", "a b")
    assert listed.splitlines()[1].split()[:5] == [run, "failed", "1", "of", "2"]
    code, report, _ = bitladder("report", "--store", "a b")
    assert code == 0
    assert f"{run}, w2a2: the loss is" in report
    assert report.endswith(f"bitladder resume {run} --store 'a b'\n")


HOT = {"lr": 1e30}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_and_resume_gives_the_bits_of_an_uninterrupted_run(
    bitladder, monkeypatch, number
):
    Path("stopping.py").write_text(STOPPING)
    write(TINY, model={"name": "stopping:Net"}, train={**TINY["train"], "epochs": 2})
    assert bitladder("run", "tiny.yaml", "--runner", "plain", "--store", "whole")[0] == 0
    monkeypatch.setenv("STOP_WITH", str(int(number)))
    code, _, err = bitladder("run", "tiny.yaml", "--runner", "plain")
    run = Store("artifacts").run()
    assert code == 128 + number
    assert err.endswith(f"stopped, and saved; go on with: bitladder resume {run.run}\n")
    assert "interrupted" in bitladder("list")[1]
    code, _, err = bitladder("resume", "--runner", "plain")
    assert code == 0, err
    assert err.startswith(f"resuming {run.run}\n")
    for stage in run.stages:
        record = Store("artifacts").find(stage["key"])
        assert record.sha256 == Store("whole").find(stage["key"]).sha256
    assert bitladder("resume")[1] == "nothing to resume: every ladder in the store is done\n"


@pytest.mark.flow
def test_a_signal_stops_a_ladder_in_prefect_the_same_way(bitladder, monkeypatch):
    Path("stopping.py").write_text(STOPPING)
    write(TINY, model={"name": "stopping:Net"})
    monkeypatch.setenv("STOP_WITH", str(int(signal.SIGTERM)))
    code, _, err = bitladder("run", "tiny.yaml")
    assert code == 143, err
    assert err.endswith(f"go on with: bitladder resume {Store('artifacts').run().run}\n")
    code, out, err = bitladder("resume", "--runner", "plain")
    assert code == 0, err
    assert "w2a2 done" in " ".join(out.split())


def test_resume_says_when_a_run_is_another_one_now(bitladder, store, monkeypatch):
    monkeypatch.setenv("BITLADDER_STORE", "changed")
    Path("stopping.py").write_text(STOPPING)
    write(TINY, model={"name": "stopping:Net"})
    monkeypatch.setenv("STOP_WITH", str(int(signal.SIGINT)))
    bitladder("run", "tiny.yaml", "--runner", "plain")
    run = Store("changed").run().run
    Path("stopping.py").write_text(STOPPING + "\n# a change\n")
    monkeypatch.delitem(sys.modules, "stopping")
    code, out, err = bitladder("resume", run, "--runner", "plain")
    assert code == 0, err
    now = Store("changed").run().run
    assert now != run
    assert f"the model's code changed since it was stored; it goes on as {now}\n" in err
    assert out.splitlines()[0] == now


def test_two_processes_train_each_stage_once_and_the_second_names_the_first(bitladder):
    config = load_config(write(TINY, train={**TINY["train"], "epochs": 20}))
    store, key = Store("artifacts"), make_plan(config).stages[0].key
    command = [sys.executable, "-m", "bitladder.flows", "run", "tiny.yaml", "--runner", "plain"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        deadline = time.monotonic() + 60
        while store.holder(key) in (None, "another process") and time.monotonic() < deadline:
            time.sleep(0.01)
        code, _, err = bitladder("run", "tiny.yaml", "--runner", "plain")
        _, told = other.communicate(timeout=60)
    assert (code, other.returncode) == (0, 0), err
    assert f"1/2 fp32 waits for process {other.pid} on " in err
    assert "1/2 fp32 was there already" in err
    both = err + told.decode()
    assert both.count("finished, validation") == 2


# -- what looks at the store -------------------------------------------------------------------


def test_list_keeps_a_run_on_one_line_however_long_its_names(bitladder):
    write(
        TINY, name="a-ladder-with-a-long-name-that-goes-on-and-on-and-on", ladder=TINY["ladder"][:1]
    )
    bitladder("run", "tiny.yaml", "--runner", "plain")
    _, out, _ = bitladder("list")
    assert len(out.splitlines()) == 2
    assert out.splitlines()[1].startswith(Store("artifacts").run().run)
    assert "tiny_convnet" in out


def test_an_empty_store_says_how_to_begin(bitladder):
    assert bitladder("list") == (
        0,
        "no ladder in artifacts yet; start one with: bitladder run digits\n",
        "",
    )
    assert bitladder("resume")[:2] == (0, "nothing to resume: no ladder in artifacts\n")
    for command in ("report", "evaluate", "verify"):
        code, out, err = bitladder(command)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
    assert bitladder("clean")[:2] == (0, "nothing to remove\n")
    assert not Path("artifacts").exists()


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ("csv", pd.read_csv),
        ("json", pd.read_json),
        ("parquet", pd.read_parquet),
        ("html", None),
        ("markdown", None),
        ("table", None),
    ],
)
def test_report_writes_every_format_to_a_file(bitladder, store, form, read):
    code, out, _ = bitladder("report", "--format", form, "--out", f"new/report.{form}")
    assert (code, out) == (0, f"new/report.{form}\n")
    if read:
        assert list(read(f"new/report.{form}")["stage"]) == ["fp32", "w2a2"]
    else:
        assert "w2a2" in Path(f"new/report.{form}").read_text()


def test_a_report_that_cannot_be_written_is_said(bitladder, store):
    Path("taken").mkdir()
    code, _, err = bitladder("report", "--format", "csv", "--out", "taken")
    assert (code, err) == (2, "error: --out taken: Is a directory\n")


def test_report_shows_runs_side_by_side(bitladder, store):
    bitladder("run", "tiny.yaml", "--runner", "plain", "--set", "ladder.1.weight_bits=4")
    one, two = (run.run for run in store.runs())
    code, out, _ = bitladder("report", one, two)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == [one, one, two, two]
    code, _, err = bitladder("report", "tiny-")
    assert code == 2
    assert one in err
    assert two in err


def test_evaluate_gives_the_recorded_accuracy_and_the_levels_of_each_layer(bitladder, store):
    code, out, _ = bitladder("evaluate", "--stage", "w2a2")
    recorded = 100 * store.read(key_of(store, "w2a2")).metrics["test_top1"]
    assert code == 0
    assert out.startswith(f"w2a2: test top-1 {recorded:.2f} % (recorded {recorded:.2f} %)")
    levels, _, costs = out.partition("MMACs")
    conv2 = [line.split() for line in levels.splitlines() if line.startswith("conv2")]
    assert [(row[1], row[3]) for row in conv2] == [("W", "2"), ("A", "2")]
    bitops = [float(line.split()[-1]) for line in costs.splitlines()[1:]]
    assert bitops[-1] == pytest.approx(sum(bitops[:-1]), abs=1e-3)
    packed = store.find(pack_spec(key_of(store, "w2a2")).key)
    assert f"{packed.metrics['packed_bytes']}" in costs.splitlines()[-1]
    code, _, err = bitladder("evaluate", "--stage", "w9a9")
    assert code == 2
    assert "there are: fp32, w2a2" in err


def test_a_damaged_file_is_found_never_used_and_redone(bitladder, store):
    assert bitladder("verify")[0] == 0
    path = damage(store, "w2a2")
    code, out, _ = bitladder("verify")
    assert code == 1
    assert f"{path} does not match its checksum" in out
    code, out, err = bitladder("evaluate", "--stage", "w2a2")
    assert (code, out) == (1, "")
    assert f"{path} does not match its checksum" in err
    assert f"redo it with: bitladder resume {store.run().run}" in err
    assert bitladder("resume", "--runner", "plain")[0] == 0
    assert bitladder("verify")[0] == 0


def test_a_store_from_a_newer_version_is_said_by_every_command(bitladder, store):
    manifest = store.stages / key_of(store, "w2a2") / "stage.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    for path in Path("artifacts").glob("results.db*"):
        path.unlink()
    before = manifest.read_text()
    for command in (["list"], ["report"], ["verify"], ["evaluate"], ["run", "tiny.yaml"]):
        code, _, err = bitladder(*command)
        assert code == 2, command
        assert "newer Bitladder (format 99" in err
    assert manifest.read_text() == before


def test_clean_says_what_it_would_remove_and_keeps_what_a_ladder_needs(bitladder, store):
    needed = {key_of(store, "fp32"), key_of(store, "w2a2")}
    needed |= {pack_spec(key).key for key in needed} | set(store.run().looks)
    for name in ("a" * 20, f"{'b' * 20}.part", f"{'c' * 20}.bad-1"):
        (store.stages / name).mkdir()
        (store.stages / name / "last.pt").write_bytes(b"123")
    (store.stages / f"{'d' * 20}.lock").touch()
    code, out, _ = bitladder("clean")
    assert code == 0
    assert out.count("  (") == 4
    assert out.endswith("nothing was removed; to remove these give --yes\n")
    with store.lock("b" * 20, waiting=pytest.fail, stop=lambda: None):
        assert bitladder("clean", "--yes")[1].endswith("removed 3, 0.0 MB\n")
        assert (store.stages / f"{'b' * 20}.part" / "last.pt").exists()
    bitladder("clean", "--yes")
    assert {path.name.partition(".")[0] for path in store.stages.iterdir()} == needed
    assert bitladder("clean")[1] == "nothing to remove\n"
    assert bitladder("verify")[0] == 0


def test_components_lists_every_part_with_its_source(bitladder):
    code, out, _ = bitladder("components")
    assert code == 0
    for name in ("lsq", "preact_resnet20", "fashion_mnist", "cross_entropy", "fitnets", "digits"):
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name
    assert "Esser et al." in out
    code, out, _ = bitladder("components", "quantizers", "lsq")
    assert "per_channel: bool  (default False)" in out
    code, out, _ = bitladder("components", "losses", "attention_transfer")
    assert "power: float  (default 2.0)" in out
    code, _, err = bitladder("components", "quantisers")
    assert code == 2
    assert "did you mean 'quantizers'?" in err


# -- quick, quiet ------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    heavy = ("torch", "pandas", "pydantic", "prefect", "sqlalchemy", "numpy", "yaml")
    assert imported_by(["--help"], heavy) == []


def test_report_and_list_import_neither_torch_nor_prefect(store):
    assert imported_by(["report"], ("torch", "prefect", "yaml")) == []
    assert imported_by(["list"], ("torch", "prefect", "yaml", "pandas")) == []


def imported_by(command, names):
    script = (
        "import sys\nfrom bitladder.flows.__main__ import main\n"
        f"sys.argv = ['bitladder', *{command!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {names!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return json.loads(done.stderr.splitlines()[-1].replace("'", '"'))


def test_a_pipe_that_closes_early_is_no_error_worth_a_traceback(store):
    command = f"{sys.executable} -m bitladder.flows report -f csv | head -c 3"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("run", "")


def test_a_narrow_terminal_cuts_no_key_and_no_run(bitladder, store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what is no terminal for one
    assert key_of(store, "w2a2") in bitladder("plan", "tiny.yaml")[1]
    assert store.run().run in bitladder("list")[1]


def test_on_a_narrow_terminal_the_report_leaves_out_what_matters_least(store):
    script = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', *sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "bitladder.flows", "report"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "60", "TERM": "xterm", "NO_COLOR": "1"},
    )
    run, *table, missing = re.sub(r"\x1b\[\d*m", "", done.stdout).splitlines()
    assert run == store.run().run
    assert all(len(line) <= 60 for line in table)
    assert "test %" in table[0]
    assert missing.startswith("(no room for Gbitops, epochs")
