"""The Prefect API that a ladder reports to: the one that is configured, or one of its own.

Run as a module this file is that own server. The process that starts it must be able to die in
any way, kill -9 included, and leave nothing behind; so the first thing the server does, before
anything heavy is imported, is to tie its life to its parent's. For the same reason this file
imports little but the standard library at its top.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import http.client
import importlib
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..pipeline.parent_death import die_with

START_SECONDS = 180.0  # 4 on an idle machine, 18 where the database is new; a busy one takes more
STOP_SECONDS = 3.0
# imported while the server starts: by the flow, and by the first optimizer; 1.5 s each
NEEDED_SOON = ("prefect.artifacts", "torch._dynamo")
LOG_NAME = "prefect-server.log"
WAY_OUT = "`--runner plain` runs the same ladder without Prefect"


class Api(Protocol):
    """A Prefect API that answers, or soon will."""

    def wait(self, timeout: float = START_SECONDS) -> str:
        """The API's URL, once it answers.

        Raises:
            BitladderError: it does not; the message says why, and the way out.
        """
        ...


@contextlib.contextmanager
def temporary_api(folder: Path) -> Iterator[Api]:
    """The configured Prefect API, or else a server of our own while the context lasts.

    Returns at once: the server starts in the background while the caller imports and loads
    data. Enter from the main thread; the kernel ends the server with the thread that started it.

    Args:
        folder: takes the server's log; made if missing.
    """
    quieten_prefect()
    if url := configured_url():
        yield ConfiguredServer(url)
        return
    server = TemporaryServer(folder / LOG_NAME)
    with _no_proxy("127.0.0.1"):
        try:
            server.start()
            yield server
        finally:
            server.stop()


class ConfiguredServer:
    """The server that PREFECT_API_URL names, in the environment or in Prefect's own settings."""

    def __init__(self, url: str) -> None:
        self.url = url

    def wait(self, timeout: float = START_SECONDS) -> str:
        """See `Api`. A server that runs already answers soon, so at most 10 seconds a try."""
        from prefect.client.orchestration import get_client
        from prefect.settings import (
            PREFECT_API_REQUEST_TIMEOUT,
            PREFECT_API_URL,
            PREFECT_CLIENT_MAX_RETRIES,
            temporary_settings,
        )

        impatient = {
            PREFECT_API_URL: self.url,
            PREFECT_API_REQUEST_TIMEOUT: min(10.0, timeout),
            PREFECT_CLIENT_MAX_RETRIES: 0,
        }
        with temporary_settings(impatient), get_client(sync_client=True) as client:
            error = client.api_healthcheck()
        if error is not None:
            raise _unavailable(
                f"no Prefect API answers at {self.url} ({error or type(error).__name__}): start "
                "that server, or unset PREFECT_API_URL (`prefect config unset PREFECT_API_URL` "
                f"where a profile sets it) to use a temporary one; {WAY_OUT}"
            )
        return self.url


class TemporaryServer:
    """A Prefect server on this machine, for this process alone."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the server and returns at once."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # The server inherits the socket, not a port number: nobody else can take it in between.
        with socket.create_server(("127.0.0.1", 0)) as listener, self.log.open("wb") as log:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            inherited = str(listener.fileno())
            self._process = subprocess.Popen(
                # -P: a `prefect.py` or `models/` in the working folder is not to be imported
                [sys.executable, "-P", "-m", __name__, "serve", inherited, str(os.getpid())],
                pass_fds=[listener.fileno()],
                # a pipe inherited here would stay open for as long as the server lives
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the ladder, which then stops the server
            )

    def wait(self, timeout: float = START_SECONDS) -> str:
        """See `Api`."""
        assert self._process is not None, "start() comes before wait()"
        deadline = time.monotonic() + timeout
        for module in NEEDED_SOON:
            importlib.import_module(module)
        while not _answers(self.url, timeout=min(1.0, timeout)):
            if (code := self._process.poll()) is not None:
                raise _unavailable(self._failure(f"ended with code {code}"))
            if time.monotonic() > deadline:
                raise _unavailable(self._failure(f"did not answer within {timeout:.0f} s"))
            time.sleep(0.05)
        return self.url

    def stop(self) -> None:
        """Ends the server; it is gone when this returns."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _failure(self, how: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        tail = "\n".join(f"    {line}" for line in lines[-8:]) or "    (nothing)"
        return f"the temporary Prefect server {how}. {WAY_OUT}. The end of {self.log}:\n{tail}"


def configured_url() -> str | None:
    """The API URL that the environment or a Prefect profile sets; None if nothing does.

    Importing Prefect to ask it takes a second, so it is asked only where one of the files that
    it would read could set a URL.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    words = {
        Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")): "prefect_api_url",
        Path(".env"): "prefect_api_url",
        Path("prefect.toml"): "url",
        Path("pyproject.toml"): "tool.prefect",
    }
    if "PREFECT_PROFILE" in os.environ or any(_has(path, word) for path, word in words.items()):
        from prefect.settings import PREFECT_API_URL

        return PREFECT_API_URL.value() or None
    return None


def quieten_prefect() -> None:
    """No telemetry and no chatter, unless the user asks for them; call before importing it."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")


def _has(path: Path, word: str) -> bool:
    try:
        return word in path.read_text(errors="replace").lower()
    except OSError:
        return False


def _answers(url: str, *, timeout: float) -> bool:
    host = url.removeprefix("http://").removesuffix("/api")
    connection = http.client.HTTPConnection(host, timeout=timeout)  # knows nothing of proxies
    try:
        connection.request("GET", "/api/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _no_proxy(host: str) -> Iterator[None]:
    """Makes clients in this process reach the host directly where a proxy is set."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    for name, hosts in before.items():
        os.environ[name] = f"{hosts},{host}" if hosts else host
    try:
        yield
    finally:
        for name, hosts in before.items():
            if hosts is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = hosts


def _unavailable(message: str) -> Exception:
    from ..pipeline.errors import BitladderError  # here: the server itself must not import it

    return BitladderError(message)


# From here on, what runs in the server's process.


def main(arguments: list[str]) -> None:
    """`serve SOCKET PARENT` is the server; `prepare` makes its database: 14 s, once a machine."""
    if arguments == ["prepare"]:
        with _settings():
            _migrate()
        return
    listener, parent = map(int, arguments[1:])
    die_with(parent)
    code = 1
    try:
        _serve(socket.socket(fileno=listener))
        code = 0
    except BaseException:
        traceback.print_exc()  # into the log, whose end the parent shows
    finally:
        os._exit(code)  # waits for no thread


def _serve(listener: socket.socket) -> None:
    gc.disable()  # saves 0.6 of 4 s of imports
    with _settings():
        import uvicorn
        from prefect.server.api.server import create_app

        gc.enable()
        _migrate()
        app = create_app(ephemeral=True, final=True)  # ephemeral: no scheduler, no late runs, ...
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Those of a server that records and does no more, with a database of its own."""
    quieten_prefect()
    os.environ.update(
        PREFECT_SERVER_API_BASE_PATH="/api",
        PREFECT_SERVER_UI_ENABLED="false",
        PREFECT_SERVER_REGISTER_BLOCKS_ON_START="false",
        PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION="false",
        PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED="false",
        PREFECT_SERVER_DATABASE_MIGRATE_ON_START="false",  # done before, under a lock
    )
    from prefect.settings import (
        PREFECT_SERVER_DATABASE_CONNECTION_URL,
        get_current_settings,
        temporary_settings,
    )

    home = get_current_settings().home
    # Prefect's own default is kept out of: another version of Prefect may have migrated it, or
    # need it as it is. A database that the user configured is used.
    url = str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value())
    if url == f"sqlite+aiosqlite:///{home}/prefect.db":
        url = f"sqlite+aiosqlite:///{home}/bitladder.db"
    with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: url}):
        yield


def _migrate() -> None:
    """Creates the database or brings it up to date, one process at a time."""
    from prefect.server.database import provide_database_interface
    from prefect.settings import get_current_settings

    with (get_current_settings().home / "bitladder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would create the same tables
        asyncio.run(provide_database_interface().create_db())


if __name__ == "__main__":
    main(sys.argv[1:])
