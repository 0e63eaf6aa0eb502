"""These start real servers: a new one answers after 4 s on an idle machine."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bitladder.flows.launch import launch
from bitladder.flows.prefect_artifacts import rung_page
from bitladder.flows.prefect_ladder import run_flow
from bitladder.flows.prefect_server import TemporaryServer, configured_url, temporary_api
from bitladder.pipeline.config_load import parse_config
from bitladder.pipeline.derived import pack_spec
from bitladder.pipeline.errors import BitladderError, Diverged
from bitladder.pipeline.events import Event
from bitladder.pipeline.plan import make_plan
from bitladder.pipeline.record import PACKED
from bitladder.pipeline.store import Store

STAGES = [{"name": "fp32"}, {"name": "w8a8"}]


@pytest.fixture(scope="module")
def home(request):
    """A PREFECT_HOME that later test runs find again: making its database takes 14 s."""
    from importlib.metadata import version

    with pytest.MonkeyPatch.context() as patch:
        folder = request.config.cache.mkdir(f"prefect-{version('prefect')}")
        patch.setenv("PREFECT_HOME", str(folder))
        patch.delenv("PREFECT_API_URL", raising=False)
        yield folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts")


def ladder_of(*rungs):
    """Its name is new each time: Prefect's database outlives the test run."""
    name = f"digits-{secrets.token_hex(4)}"
    widths = [{"weight_bits": bits, "activation_bits": bits, **options} for bits, options in rungs]
    return parse_config(
        {"name": name, "model": "tiny_convnet", "train": {"epochs": 1}, "ladder": widths}
    )


@pytest.fixture
def run_id(store):
    """A ladder of `STAGES` in the store, of which nothing is done."""
    return store.register(make_plan(ladder_of((32, {}), (8, {})))).run


@pytest.fixture(scope="module")
def server(home, tmp_path_factory):
    server = TemporaryServer(tmp_path_factory.mktemp("server") / "server.log")
    try:
        server.start()
        server.wait()
        pid = server.pid
        yield server
        server.stop()
        assert not is_alive(pid)
    finally:
        server.stop()


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def run_one(stage, tell):
    position = [each["name"] for each in STAGES].index(stage["name"])
    about = {"stage": stage["name"], "position": position, "stages": 2, "epochs": 1}
    tell(Event("started", **about))
    tell(Event("epoch", epoch=1, fraction=1.0, accuracy=0.9, **about))
    tell(Event("finished", metrics={"test_top1": 0.9125}, **about))
    return {"name": stage["name"], "sha256": "0f"}


def read_run(server, run_id):
    """The flow run so named, its task runs by start, its artifacts by key."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        ArtifactFilter,
        ArtifactFilterFlowRunId,
        FlowRunFilter,
        FlowRunFilterName,
    )
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: server.url}),
        get_client(sync_client=True) as client,
    ):
        named = FlowRunFilter(name=FlowRunFilterName(any_=[run_id]))
        [run] = client.read_flow_runs(flow_run_filter=named)
        tasks = client.read_task_runs(flow_run_filter=named)
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
    return run, sorted(tasks, key=lambda t: t.start_time), {a.key: a for a in artifacts if a.key}


@pytest.mark.flow
def test_a_temporary_server_is_gone_after_its_context_however_that_ends(home, tmp_path):
    pids = []

    def fail():
        with temporary_api(tmp_path) as api:
            pids.append(api.pid)
            assert is_alive(api.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not is_alive(pids[0])


@pytest.mark.flow
@pytest.mark.parametrize("ready", [False, True], ids=["starting", "answering"])
def test_a_killed_ladder_leaves_no_server_and_no_open_pipe(home, tmp_path, ready):
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from bitladder.flows.prefect_server import temporary_api\n"
        "with temporary_api(Path(sys.argv[1])) as api:\n"
        f"    {ready} and api.wait()\n"
        "    print(api.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ladder:
        pid = int(ladder.stdout.readline())
        assert is_alive(pid)
        ladder.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        ladder.stdout.read()  # returns when nobody holds the other end any more
        while is_alive(pid) and time.monotonic() - killed < 10:
            time.sleep(0.05)
        assert time.monotonic() - killed < 5


@pytest.mark.flow
def test_a_server_that_cannot_start_says_why_and_the_way_out(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a file where Prefect wants a folder")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    server = TemporaryServer(tmp_path / "server.log")
    try:
        server.start()
        with pytest.raises(BitladderError, match=r"(?s)--runner plain.*NotADirectoryError"):
            server.wait()
    finally:
        server.stop()


def test_a_configured_server_that_does_not_answer_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with (
        temporary_api(tmp_path) as api,
        pytest.raises(BitladderError, match=r"http://127\.0\.0\.1:9/api.*unset PREFECT_API_URL"),
    ):
        api.wait()


def test_a_profile_can_name_the_server(monkeypatch, tmp_path):
    profile = '[profiles.lab]\nPREFECT_API_URL = "http://lab:4200/api"\n'
    (tmp_path / "profiles.toml").write_text(f'active = "lab"\n\n{profile}')
    script = "from bitladder.flows.prefect_server import configured_url as f; print(f())"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "http://lab:4200/api"


def test_where_nothing_names_a_server_prefect_is_not_imported_to_find_out(monkeypatch, tmp_path):
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "prefect.settings", None)  # an import of it would fail
    assert configured_url() is None


@pytest.mark.flow
def test_a_flow_gives_the_records_in_order_and_shows_tasks_that_say_rung_and_ladder(
    server, store, run_id
):
    heard = []
    records = run_flow(
        run_id, store, STAGES, run_one, api_url=server.url, total=2, listener=heard.append
    )
    run, tasks, _ = read_run(server, run_id)
    assert records == [{"name": "fp32", "sha256": "0f"}, {"name": "w8a8", "sha256": "0f"}]
    assert [event.kind for event in heard] == ["started", "epoch", "finished"] * 2
    assert run.state.is_completed()
    assert {run_id, "bitladder"} <= set(run.tags)
    assert run.parameters == {
        "run_id": run_id,
        "store": str(store.root.resolve()),
        "stages": STAGES,
    }
    assert [(task.name, task.state_name) for task in tasks] == [
        (f"1/2 fp32 of {run_id}", "Completed"),
        (f"2/2 w8a8 of {run_id}", "Completed"),
    ]


@pytest.mark.parametrize(
    ("drop", "words"), [("+1.39", "1.39 points below FP32"), ("-2.22", "2.22 points above FP32")]
)
def test_a_rungs_page_begins_with_a_sentence_about_its_drop(drop, words):
    shown = {"stage": "a|b", "W": "4", "test %": "97.22", "drop": drop, "size kB": "53.1"}
    page = rung_page("digits: a|b", shown, dict.fromkeys(("model", "device", "key", "note")))
    assert f"**97.22 %** of the test images are classified right, {words}; the packed file" in page
    assert "| | a\\|b |" in page


@pytest.mark.flow
def test_artifacts_say_what_is_done_what_failed_and_how_to_go_on(server, store, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    config = ladder_of((32, {}), (8, {"train": {"optimizer": {"lr": 1e30}}}))
    with pytest.raises(Diverged):
        launch(config, store, runner="prefect", listener=lambda event: None)
    run = store.run()
    flow_run, _, artifacts = read_run(server, run.run)
    assert {"bitladder", run.run, config.name, "digits", "tiny_convnet"} == set(flow_run.tags)
    assert {key.removeprefix(f"{run.run}-"): each.type for key, each in artifacts.items()} == {
        "table": "table",
        "reports": "markdown",  # so Prefect stores links
        "1-fp32": "markdown",
        "1-fp32-progress": "progress",
        "1-fp32-file": "markdown",
        "2-w8a8": "markdown",
        "2-w8a8-progress": "progress",
    }
    data = {key.removeprefix(f"{run.run}-"): each.data for key, each in artifacts.items()}
    said = {key.removeprefix(f"{run.run}-"): each.description for key, each in artifacts.items()}
    done, failed = json.loads(data["table"])
    top1 = 100 * store.results(run)[0]["test_top1"]
    assert (done["stage"], done["state"], done["test %"]) == ("fp32", "done", f"{top1:.2f}")
    assert (failed["stage"], failed["state"], failed["test %"]) == ("w8a8", "failed", "")
    assert f"**{top1:.2f} %** of the test images" in data["1-fp32"]
    assert said["1-fp32"].startswith(f"fp32: {top1:.2f} % right, ")
    assert said["2-w8a8"].startswith("w8a8 stopped: the loss is")
    file = store.stages.resolve() / pack_spec(run.trained[0]).key / PACKED
    assert data["1-fp32-file"] == f"[{file}]({file.as_uri()})"
    assert "> the loss is" in data["2-w8a8"]
    assert f"bitladder resume {run.run} --store" in data["2-w8a8"]
    assert data["1-fp32-progress"] == 100
    assert data["2-w8a8-progress"] < 100
    assert "failed: the loss is" in artifacts[f"{run.run}-2-w8a8-progress"].description


class Unusual(Exception):
    """Cannot be pickled, copied or built from its arguments, as some are."""

    def __init__(self, *, lock):
        super().__init__()
        self.lock = lock


@pytest.mark.flow
@pytest.mark.parametrize("error", [Unusual(lock=iter([])), KeyboardInterrupt()], ids=["own", "^C"])
def test_an_error_comes_out_as_itself_and_the_run_is_recorded(server, store, run_id, capfd, error):
    def fail(stage, tell):
        if stage["name"] == "w8a8":
            raise error
        return {}

    with pytest.raises(type(error)) as caught:
        run_flow(run_id, store, STAGES, fail, api_url=server.url)
    run, tasks, _ = read_run(server, run_id)
    assert caught.value is error
    assert run.state.is_failed() or run.state.is_crashed()
    assert tasks[0].state.is_completed()
    assert not tasks[1].state.is_completed()
    assert capfd.readouterr() == ("", "")  # the command line says it, once


@pytest.mark.flow
def test_the_callers_sigterm_handler_is_in_effect_while_a_stage_runs(server, store, run_id):
    stopped = []

    def run_and_stop(stage, tell):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"stopped": len(stopped)}

    handler = lambda number, frame: stopped.append(number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, handler)
    try:
        records = run_flow(run_id, store, STAGES, run_and_stop, api_url=server.url)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert records == [{"stopped": 1}, {"stopped": 2}]


def growing(done):
    """Stages of which each is known when as many before it are done."""
    for number in range(3):
        assert len(done) == len(STAGES) + number
        yield {"name": f"later-{number}"}


@pytest.mark.flow
def test_later_stages_are_asked_for_when_those_before_them_are_done(server, store, run_id):
    done = []

    def run_and_note(stage, tell):
        done.append(stage["name"])
        return stage

    run_flow(run_id, store, STAGES, run_and_note, api_url=server.url, later=growing(done))
    names = ["fp32", "w8a8", "later-0", "later-1", "later-2"]
    assert done == names
    _, tasks, _ = read_run(server, run_id)
    assert [task.name for task in tasks] == [
        f"rung {n} {name} of {run_id}" for n, name in enumerate(names, 1)
    ]


def test_a_prefect_that_fails_loses_no_later_stage_and_no_error_in_finding_one(home, store, run_id):
    done = []

    def run_and_note(stage, tell):
        done.append(stage["name"])
        return stage

    def failing():
        yield from growing(done)
        raise LookupError("no next rung")

    with pytest.raises(LookupError, match="no next rung"):
        run_flow(
            run_id,
            store,
            STAGES,
            run_and_note,
            api_url="http://127.0.0.1:9/api",
            later=failing(),
        )
    assert done[2:] == ["later-0", "later-1", "later-2"]


def test_a_prefect_that_fails_costs_a_warning_and_no_stage(home, store, run_id, caplog):
    records = run_flow(run_id, store, STAGES, run_one, api_url="http://127.0.0.1:9/api")
    assert [record["name"] for record in records] == ["fp32", "w8a8"]
    assert len([r for r in caplog.records if "goes on without it" in r.message]) == 1


DIES = """
import sys
from pathlib import Path
from bitladder.flows.prefect_ladder import run_flow
from bitladder.flows.prefect_server import TemporaryServer
from bitladder.pipeline.events import Event
from bitladder.pipeline.store import Store

server = TemporaryServer(Path(sys.argv[1]) / "server.log")
server.start()

def kill_and_run(stage, tell):
    server.stop()
    for kind in ("started", "finished"):
        tell(Event(kind, stage=stage["name"], position=0, stages=2))
    return stage

stages = [{"name": "fp32"}, {"name": "w8a8"}]
store = Store(sys.argv[2])
print(run_flow(sys.argv[3], store, stages, kill_and_run, api_url=server.wait()))
"""


@pytest.mark.slow  # Prefect's threads try for half a minute to reach the server
@pytest.mark.flow
def test_a_server_that_dies_takes_no_stage_with_it(home, tmp_path, store, run_id):
    command = [sys.executable, "-c", DIES, str(tmp_path), str(store.root), run_id]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[{'name': 'fp32'}, {'name': 'w8a8'}]\n"
    assert done.stderr.count("Prefect takes no artifacts") == 1
