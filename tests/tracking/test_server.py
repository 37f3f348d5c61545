"""The servers of `make ui` and `make server`: who may reach them, and by which names."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from helpers import free_port, postgres, postgres_programs

from kdpipe.tracking.server import check_store

ROOT = Path(__file__).parents[2]
ELSEWHERE = ["evil.example", "10.evil.example", "192.168.evil.example", "localhost.evil.example", ""]


@contextmanager
def serving(folder: Path, target: str, *variables: str, **environment: str) -> Iterator[int]:
    """The port of a server started by `make`, with its store in the folder."""
    port = free_port()
    command = ["make", f"--directory={ROOT}", target, f"PORT={port}", f"ARGS=output_dir={folder}", *variables]
    command += [f"BIN={Path(sys.executable).parent}", "--old-file=.venv/ready"]
    log = folder / "log"
    process = subprocess.Popen(
        command,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"MLFLOW_WORKERS": "1"} | environment,
    )
    try:
        deadline = time.monotonic() + 120
        while "Uvicorn running" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def status(port: int, name: str) -> int:
    """The status of an API request that calls the server by this name."""
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": name}), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def statuses(port: int, names: list[str]) -> dict[str, int]:
    return {name: status(port, name) for name in names}


def with_port(*names: str) -> list[str]:
    return [*names, *(f"{name}:5000" for name in names)]


def listening_addresses(port: int) -> list[str]:
    """In the kernel's notation: 0100007F is 127.0.0.1."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    sockets = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [local[:-5] for _, local, _, state, *_ in sockets if state == "0A" and local[-4:] == f"{port:04X}"]


def test_only_this_machine_can_reach_the_ui_whatever_the_environment_says(tmp_path: Path) -> None:
    environment = {
        "HOST": "0.0.0.0",  # not meant for us: conda sets it, and some shells do
        "ALLOWED_HOSTS": "*",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "*",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true",
        "MLFLOW_TRACKING_URI": "",
    }
    with serving(tmp_path, "ui", **environment) as port:
        allowed = with_port("localhost", "127.0.0.1", "[::1]")
        assert statuses(port, allowed) == dict.fromkeys(allowed, 200)
        assert statuses(port, ELSEWHERE) == dict.fromkeys(ELSEWHERE, 403)
        if sys.platform == "linux":
            assert listening_addresses(port) == ["0100007F"]


def test_a_server_for_many_machines_answers_to_its_names(tmp_path: Path) -> None:
    variables = ["HOST=0.0.0.0", "ALLOWED_HOSTS=head-node,10.0.0.5", f"DATABASE=sqlite:///{tmp_path}/mlflow.db"]
    with serving(tmp_path, "server", *variables) as port:
        own = [socket.gethostname(), socket.getfqdn()]
        allowed = with_port("localhost", "127.0.0.1", "[::1]", "head-node", "10.0.0.5", *map(str.lower, own))
        assert statuses(port, allowed) == dict.fromkeys(allowed, 200)
        refused = [*ELSEWHERE, "10.0.0.6", "head-node.evil.example"]
        assert statuses(port, refused) == dict.fromkeys(refused, 403)
        if sys.platform == "linux":
            assert listening_addresses(port) == ["00000000"]
        assert f"tracking.uri=http://{own[0].lower()}:{port}" in (tmp_path / "log").read_text()

        check_store(f"http://LOCALHOST:{port}/")
        check_store(f"http://user:password@localhost:{port}")
        if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
            with pytest.raises(ValueError, match=r"refuses to be called 127\.0\.0\.9; .* ALLOWED_HOSTS=127\.0\.0\.9$"):
                check_store(f"http://127.0.0.9:{port}")

        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            database.execute("ALTER TABLE experiments RENAME TO lost")
        with pytest.raises(
            ValueError, match=r"the server there answers 5\d\d, its database may be down: .*no such table"
        ):
            check_store(f"http://localhost:{port}")


@pytest.mark.faults
def test_a_server_whose_database_hangs_or_is_down_is_refused_within_seconds(tmp_path: Path) -> None:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    with postgres(programs) as (database, process), serving(tmp_path, "server", f"DATABASE={database}") as port:
        uri = f"http://localhost:{port}"
        check_store(uri)
        check_store(database)
        with (
            stopped(process),
            refused(r"no tracking server answers there \(Read timed out.*\); start it"),
        ):
            check_store(uri)
        check_store(uri)
        os.kill(process, signal.SIGQUIT)
        while is_listening(database):
            time.sleep(0.05)
        with refused("answers 503, its database may be down: .*psycopg"):
            check_store(uri)
        with refused(r"no database answers at 127\.0\.0\.1:\d+ \("):
            check_store(database)


def is_listening(database: str) -> bool:
    try:
        check_store(database)
    except ValueError:
        return False
    return True


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """Stop a process and its children, as on a hanging machine."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for number in (process, *map(int, children)):
        os.kill(number, signal.SIGSTOP)
    try:
        yield
    finally:
        for number in (process, *map(int, children)):
            os.kill(number, signal.SIGCONT)


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """Expect a refusal in one line, within 10 seconds."""
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"^tracking\.uri=.*{reason}") as caught:
        yield
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
