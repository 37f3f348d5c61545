"""Passwords of stores: the runs get there, and nothing that is printed or kept has them."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers import Outcome, assert_refused
from mlflow import MlflowClient

from kdpipe.runs.journal import CREATION_TOKEN, KILLED, TRACKING, Journal
from kdpipe.runs.store_address import store_uri
from kdpipe.settings.composition import hide_passwords
from kdpipe.settings.credentials import put_away
from kdpipe.tracking import RunStore
from kdpipe.tracking.server import NAME, PASSWORD, sign_in, signed_in

SECRET = "s3/cr@et"  # percent-encoded in addresses
MARK = "s3"  # begins it, encoded or not
RUN = ["dataset=digits", "experiment=student", "train.epochs=1", "train.threads=1"]


@pytest.fixture
def with_password(server: str, database: str) -> dict[str, str]:
    """Addresses with a password, which these stores do not ask for, by the kind of store."""
    place = quote(SECRET, safe="")
    found = {"server": server.replace("://", f"://me:{place}@")}
    if database.startswith("postgresql"):
        found["database"] = database.replace("mlflow@", f"mlflow:{place}@")
        found["query"] = f"{database}?password={place}"
    return found


def assert_secret(outcome: Outcome, folder: Path = Path()) -> None:
    """Nothing that the command printed, and no file below the folder, has the password."""
    assert MARK not in outcome.output + outcome.errors
    has_it = [file for file in folder.rglob("*") if file.is_file() and f"{MARK}/cr".encode() in file.read_bytes()]
    has_it += [file for file in folder.rglob("*") if file.is_file() and f"{MARK}%2Fcr".encode() in file.read_bytes()]
    assert has_it == []


@pytest.mark.parametrize("kind", ["server", "database", "query"])
def test_a_password_on_the_command_line_is_nowhere_afterwards(
    kdpipe: Callable, with_password: dict[str, str], kind: str
) -> None:
    if kind not in with_password:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    uri = with_password[kind]
    begun = kdpipe(*RUN, f"tracking.experiment=secret_{kind}", f"tracking.uri='{uri}'")
    assert begun.status == 0, begun.errors
    assert "to compare all runs: python -m kdpipe.compare" in begun.output and "PASSWORD" in begun.output
    assert_secret(begun)
    (kept,) = Path().glob("outputs/runs/*/.hydra/overrides.yaml")
    assert "PASSWORD" in kept.read_text()
    again = kdpipe(*RUN, f"tracking.experiment=secret_{kind}", f"tracking.uri='{uri}'")
    assert "this run is already finished" in again.output


def test_a_password_in_a_config_file_or_a_variable_is_not_kept_with_the_run(
    kdpipe: Callable, with_password: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = with_password["server"]
    lab = Path("lab/experiment/lab.yaml")
    lab.parent.mkdir(parents=True)
    lab.write_text(f"# @package _global_\ntracking:\n  uri: {uri}\n  experiment: secret_file\n")
    outcome = kdpipe("--config-dir=lab", "experiment=lab", "loss=cross_entropy", RUN[0], *RUN[2:])
    assert outcome.status == 0, outcome.errors
    assert_secret(outcome, Path("outputs"))
    monkeypatch.setenv("LAB", uri)
    outcome = kdpipe(*RUN, "seed=1", "tracking.uri=${oc.env:LAB}", "tracking.experiment=secret_file")
    assert outcome.status == 0, outcome.errors
    assert_secret(outcome, Path("outputs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    outcome = kdpipe(*RUN, "seed=2", "tracking.experiment=secret_file")
    assert outcome.status == 0, outcome.errors
    assert_secret(outcome, Path("outputs"))


@pytest.mark.faults
def test_a_sweep_and_its_workers_keep_no_password(kdpipe: Callable, with_password: dict[str, str]) -> None:
    words = ["-m", *RUN, "seed=0,1", "tracking.experiment=secret_sweep", "hydra/launcher=joblib"]
    outcome = kdpipe(*words, f"tracking.uri={with_password['server']}", "hydra.launcher.n_jobs=2")
    assert outcome.status == 0, outcome.errors
    assert_secret(outcome)


@pytest.mark.parametrize(
    "words",
    [
        ["tracking.uri=http://me:s3 cret@host"],
        ["tracking.uri=[http://me:s3cret@host]"],
        ["tracking.uri=ftp://me:s3cret@host"],
        ["-m", "tracking.uri=http://me:s3cret@host,http://me:s3cret@other"],
        ["+tracking.url=http://me:s3cret@host"],
        ["tracking=http://me:s3cret@host"],
        ["tracking={uri:'http://me:s3cret@127.0.0.1:1'}"],
        ["output_dir=${tracking.uri}", "tracking.uri='ftp://me:s3cret@host'"],
        ["tracking.uri=https://host/?access_token=s3cret", "tracking.experiment=' '"],
    ],
)
def test_an_error_about_a_store_hides_its_password(kdpipe: Callable, words: list[str]) -> None:
    outcome = kdpipe(*words, *RUN)
    assert outcome.status == 1
    assert_secret(outcome)


def test_what_is_printed_stands_for_the_address_in_the_environment(
    kdpipe: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = "postgresql://me:PASSWORD@127.0.0.1:1/db"
    assert_refused(
        kdpipe(*RUN, f"tracking.uri={shown}"),
        f"tracking.uri={shown}: PASSWORD stands for a password that is not shown; expected the password in its place, "
        "or the whole address in MLFLOW_TRACKING_URI",
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:s3cret@127.0.0.1:1/db")
    assert store_uri(shown, tmp_path) == "postgresql://me:s3cret@127.0.0.1:1/db"
    assert "no database answers" in kdpipe(*RUN, f"tracking.uri={shown}").errors
    with pytest.raises(ValueError, match="PASSWORD stands for"):  # another store
        store_uri("postgresql://me:PASSWORD@127.0.0.1:1/other", tmp_path)


def test_the_words_of_a_command_keep_their_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    words = ["seed=1", "++tracking.uri='http://me:s3@h?a=b'", "dataset.root=http://me:s3@h", "tracking.experiment=a"]
    assert hide_passwords(words) == [words[0], "++tracking.uri='http://me:PASSWORD@h?a=b'", *words[2:]]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://me:s3@h?a=b"
    assert hide_passwords(["tracking={uri:'http://me:s4@h',experiment:a}"]) == [
        "tracking={uri:'http://me:PASSWORD@h',experiment:a}"
    ]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://me:s4@h"
    assert hide_passwords(["tracking.uri=http://h"]) == ["tracking.uri=http://h"]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://me:s4@h"  # for teachers elsewhere, and the like


def test_sync_gets_the_password_from_the_environment_or_its_option(
    kdpipe: Callable, command: Callable, with_password: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = with_password["server"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(NAME, "")  # signed in to for a while
        environment.setenv(PASSWORD, "")
        client = RunStore(uri).client
    experiment = client.create_experiment("secret_sync")
    for number, words in enumerate([[], ["--uri", uri]]):
        token = {CREATION_TOKEN: f"{experiment}/{number}"}
        run_id = client.create_run(experiment, tags=token).info.run_id
        folder = tmp_path / "outputs/runs" / str(number)
        folder.mkdir(parents=True)
        Journal(folder, uri, run_id, token, status=KILLED, reason="a test").write()
        assert_secret(Outcome(0, "", ""), folder)
        refused = command("sync")
        assert refused.status == 1
        assert "PASSWORD stands for a password that is not shown" in refused.output
        with pytest.MonkeyPatch.context() as environment:
            if not words:
                environment.setenv("MLFLOW_TRACKING_URI", uri)
            outcome = command("sync", *words)
        assert outcome.status == 0, outcome.output
        assert client.get_run(run_id).info.status == KILLED
        assert_secret(outcome, folder)


def test_a_journal_of_an_earlier_version_loses_its_password(tmp_path: Path) -> None:
    Journal(tmp_path, "http://me:PASSWORD@host", "abc", {}).write()
    file = tmp_path / TRACKING
    file.write_text(file.read_text().replace("PASSWORD", "s3cret"))
    journal = Journal.read(tmp_path)
    assert journal and journal.uri == "http://me:PASSWORD@host"
    journal.write()
    assert "s3cret" not in file.read_text()


def test_a_password_goes_to_its_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "before")
    monkeypatch.delenv(PASSWORD, raising=False)

    def signed() -> tuple[str | None, str | None]:
        return os.environ.get(NAME), os.environ.get(PASSWORD)

    assert sign_in("http://me:a%40b@Host:5000/") == "http://host:5000"
    assert signed() == ("me", "a@b")
    with signed_in("http://other") as address:
        assert (address, signed()) == ("http://other", ("before", None))
    with signed_in("http://you:c@other"):
        assert signed() == ("you", "c")
    assert signed() == ("me", "a@b")
    assert sign_in("postgresql://me:x@host/db") == "postgresql://me:x@host/db"
    assert signed() == ("before", None)


def test_make_does_not_echo_a_password(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho begun\n")
    python.chmod(0o755)
    words = ["make", f"--directory={Path(__file__).parents[2]}", "--old-file=.venv/ready", f"BIN={tmp_path}"]
    for target in ("distill", "demo"):
        arguments = f"ARGS=tracking.uri=http://me:{SECRET}@127.0.0.1:1"
        done = subprocess.run([*words, target, arguments], capture_output=True, text=True)
        assert "begun" in done.stdout
        assert MARK not in done.stdout + done.stderr
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@127.0.0.1:1"}
    done = subprocess.run([*words, "demo"], capture_output=True, text=True, env=environment)
    assert "begun" in done.stdout
    assert MARK not in done.stdout + done.stderr


def test_nothing_is_put_away_of_an_address_without_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert put_away("http://me@host") == "http://me@host"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://elsewhere"


def test_links_and_clients_of_a_store_have_no_password(
    with_password: dict[str, str], server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, "")
    monkeypatch.setenv(PASSWORD, "")
    store = RunStore(with_password["server"])
    assert (store.uri, store.ui) == (server, server)
    assert isinstance(store.client, MlflowClient) and MARK not in store.client.tracking_uri
