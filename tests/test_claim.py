"""A run belongs to one process at a time."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from mlflow import MlflowClient

from kdpipe.claim import ClaimedError, claim, wait_until_free
from kdpipe.tracking import Tracker


def hold(folder: Path, told: Connection) -> None:
    with claim(folder) as claimed:
        claimed.starts("a run")
        told.send("claimed")
        told.recv()


@pytest.fixture
def holder(tmp_path: Path) -> multiprocessing.Process:
    """Another process, that has the run of `tmp_path` and keeps it."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path, there), daemon=True)
    process.start()
    assert here.recv() == "claimed"
    process.here = here
    return process


def test_a_run_that_another_process_has_is_refused_with_its_number(
    tmp_path: Path, holder: multiprocessing.Process
) -> None:
    with pytest.raises(ClaimedError, match=rf"process {holder.pid} on .* has this run in progress"), claim(tmp_path):
        pass
    holder.here.send("leave")
    wait_until_free(tmp_path)
    with claim(tmp_path):
        pass


def test_a_killed_process_has_nothing_any_more_and_its_run_is_known(
    tmp_path: Path, holder: multiprocessing.Process
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with claim(tmp_path) as claimed:
        assert claimed.last_run == "a run"


def test_an_abandoned_run_is_closed_and_only_if_it_was_running(empty_store: Path, tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{empty_store}", "abandoned", tmp_path)
    client = MlflowClient(f"sqlite:///{empty_store}")
    running, finished = (client.create_run(tracker.experiment_id).info.run_id for _ in range(2))
    client.set_terminated(finished, "FINISHED")
    for run_id in (running, finished, "of another store", None):
        tracker.close_abandoned(run_id)
    assert client.get_run(running).info.status == "KILLED"
    assert client.get_run(running).data.tags["kdpipe.reason"] == "its process is gone"
    assert client.get_run(finished).info.status == "FINISHED"
