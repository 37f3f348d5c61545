"""MLflow's registry: exported models under a name."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from helpers import Outcome, Taught, assert_refused, free_port
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from kdpipe.export import predictor
from kdpipe.export.predictor import open_onnx

QUICK = ("--seconds", 0, "--images", 50, "--max-loss", 10)


def test_registering_a_model_sets_signature_and_alias_and_leaves_the_run_as_it_is(
    taught: Taught, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(taught.uri)
    before = client.get_run(taught.student).info
    for number, (words, int8) in enumerate([([], "false"), (["--register-int8"], "true")], start=1):
        made = command("export", taught.student, "--out", f"files{number}", "--register", "digits", *words, *QUICK)
        assert made.status == 0, made.errors
        assert f"registered: digits version {number}, alias candidate" in made.output
        version = client.get_model_version_by_alias("digits", "candidate")
        assert (version.version, version.run_id) == (number, taught.student)
        assert version.tags["int8"] == int8 and 0 <= float(version.tags["test_accuracy"]) <= 1
        assert json.loads(version.tags["class_names"]) == [str(digit) for digit in range(10)]
        assert float(version.tags["temperature"]) > 0 and "softmax(logits / temperature)" in version.description
    after = client.get_run(taught.student).info
    assert (after.status, after.end_time) == (before.status, before.end_time) == ("FINISHED", before.end_time)
    first = client.get_model_version("digits", "1").source  # which later exports have to leave as it is
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("digits", "champion")

    monkeypatch.setattr(predictor, "__version__", "99")  # a later kdpipe makes another file
    command("export", taught.student, "--out", "files3", "--register", "digits", "--alias", "champion", *QUICK)
    champion = client.get_model_version_by_alias("digits", "champion")
    assert champion.version == 3 and champion.source != first
    assert client.get_model_version_by_alias("digits", "candidate").version == 2


def predicted(uri: str, model: str, inputs: object) -> np.ndarray:
    """The logits from `mlflow models predict`."""
    Path("input.json").write_text(json.dumps(inputs))
    words = [sys.executable, "-m", "mlflow", "models", "predict", "-m", model, "--env-manager", "local"]
    words += ["-i", "input.json", "-o", "answers.json"]
    done = subprocess.run(words, env={**os.environ, "MLFLOW_TRACKING_URI": uri}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(Path("answers.json").read_text())["predictions"]["logits"])


def test_mlflow_predicts_with_a_registered_model(taught: Taught, command: Callable) -> None:
    made = command("export", taught.student, "--out", "files", "--register", "answering", *QUICK)
    assert "mlflow models predict -m models:/answering@candidate --env-manager local" in made.output
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
    expected = open_onnx(Path("files/model.onnx")).forward(images)
    answers = predicted(taught.uri, "models:/answering@candidate", {"inputs": {"images": images.tolist()}})
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-5)


@contextmanager
def served(uri: str, model: str) -> Iterator[str]:
    """The address of `mlflow models serve`."""
    port = free_port()
    words = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    with Path("log").open("w") as log:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": programs}
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/ping", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, Path("log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_a_served_model_answers_class_names_and_calibrated_probabilities(taught: Taught, command: Callable) -> None:
    made = command("export", taught.student, "--out", "files", "--register", "named", *QUICK)
    assert "mlflow models serve -m models:/named@candidate --env-manager local" in made.output
    version = MlflowClient(taught.uri).get_model_version_by_alias("named", "candidate")
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
    exported = open_onnx(Path("files/model.onnx"))
    expected = exported.probabilities(images)  # at the temperature that the run fitted on its validation images
    assert float(version.tags["temperature"]) not in (0, 1)
    assert version.source.startswith(f"runs:/{taught.student}/")  # logged with the run, which serves as well
    for model in ("models:/named@candidate", version.source):
        with served(taught.uri, model) as address:
            body = json.dumps({"inputs": {"images": images.tolist()}}).encode()
            with urlopen(Request(address, body, {"Content-Type": "application/json"}), timeout=60) as answer:
                answers = json.load(answer)["predictions"]
        np.testing.assert_allclose(answers["logits"], exported.forward(images), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answers["probabilities"], expected, rtol=1e-4, atol=1e-5)
        assert answers["class_names"] == list(exported.class_names)
        assert answers["class"] == [exported.class_names[likeliest] for likeliest in expected.argmax(axis=1)]


@pytest.mark.faults
def test_models_go_to_a_server_s_registry_and_back(
    kdpipe: Callable, command: Callable, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student: Outcome = kdpipe("dataset=digits", "experiment=student", "train.epochs=0", f"tracking.uri={server}")
    assert student.status == 0, student.errors
    run_id = re.search(r"kdpipe\.export (\w+)", student.output)[1]
    made = command("export", run_id, "--uri", server, "--out", "files", "--register", "served", *QUICK)
    assert made.status == 0, made.errors
    images = np.zeros((2, 1, 8, 8), np.uint8)
    answers = predicted(server, "models:/served@candidate", {"inputs": images.tolist()})
    np.testing.assert_allclose(answers, open_onnx(Path("files/model.onnx")).forward(images), rtol=1e-4, atol=1e-5)


def test_a_registry_that_refuses_a_model_gives_one_line_and_the_files_stay(
    taught: Taught, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("RESOURCE_QUOTA:\n no more models")

    monkeypatch.setattr(MlflowClient, "create_model_version", refuse)
    refused = command("export", taught.student, "--out", "files", "--register", "full", *QUICK)
    assert_refused(refused)
    assert f"--register full: {taught.uri} did not take the model (RESOURCE_QUOTA: no more models)" in refused.errors
    assert Path("files/model.onnx").exists()
