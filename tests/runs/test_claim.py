"""One process at a time runs a run."""

import json
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread

import pytest

from kdpipe.runs.claim import ClaimedError, claim, locked, wait_until_free, worker_pid
from kdpipe.runs.journal import Journal
from kdpipe.tracking import Tracker


def hold(folder: Path, parent: Connection) -> None:
    with claim(folder):
        parent.send("claimed")
        parent.recv()


@pytest.fixture
def holder(tmp_path: Path) -> multiprocessing.Process:
    """Another process that holds the claim on `tmp_path`."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, there), daemon=True)
    process.start()
    assert here.recv() == "claimed"
    process.here = here
    return process


def test_a_run_in_progress_is_refused_with_its_process_id(tmp_path: Path, holder: multiprocessing.Process) -> None:
    with pytest.raises(ClaimedError, match=rf"process {holder.pid} on .* has this run in progress"), claim(tmp_path):
        pass
    assert worker_pid(tmp_path) == holder.pid
    holder.here.send("leave")
    wait_until_free(tmp_path)
    assert worker_pid(tmp_path) is None
    with claim(tmp_path):
        pass


def test_a_killed_process_leaves_no_claim(tmp_path: Path, holder: multiprocessing.Process) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with claim(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_a_claim_waits_for_the_recovery_of_a_killed_run(tmp_path: Path, holder: multiprocessing.Process) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    tidying = Thread(target=hold_a_moment, args=(tmp_path, held := Event()))
    tidying.start()
    held.wait()
    with claim(tmp_path):
        assert not tidying.is_alive()


def hold_a_moment(folder: Path, held: Event) -> None:
    with locked(folder):
        held.set()
        time.sleep(1)


def test_a_run_left_by_another_machine_is_not_recovered_here(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "abandoned", tmp_path)
    statuses = []
    for host in (socket.gethostname(), "another"):
        folder = tmp_path / "runs" / host
        folder.mkdir(parents=True)
        run_id = tracker.client.create_run(tracker.experiment_id).info.run_id
        Journal(folder, tracker.uri, run_id, {}).write()
        (folder / "owner.json").write_text(json.dumps({"pid": 1, "host": host}))
        tracker.recover_all(tmp_path / "runs")
        statuses.append(tracker.client.get_run(run_id).info.status)
    assert statuses == ["KILLED", "RUNNING"]
