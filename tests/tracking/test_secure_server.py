"""Servers behind HTTPS and passwords, asked as MLflow's own client asks them."""

import ipaddress
import os
import re
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from helpers import Forwarding, assert_refused, free_port, running_server
from mlflow import MlflowClient
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from kdpipe.tracking.server import NAME, PASSWORD, check_store

RUN = ["dataset=digits", "experiment=student", "train.epochs=0", "train.threads=1"]
TLS = ["MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE"]
ADMIN = {NAME: "admin", PASSWORD: "p@ss:w/rd of the admin"}


def certificate(name: str, issuer: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate in PEM, of an authority where it signs itself, else of the server 127.0.0.1."""
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(*reversed(names), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .add_extension(here, critical=False)
        .sign(signer, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificate of a private authority, ca.pem, and key and certificate of a server, server.pem."""
    folder = tmp_path_factory.mktemp("authority")
    root, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (folder / "ca.pem").write_bytes(certificate("a private authority", "a private authority", root, root))
    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(key + certificate("a server", "a private authority", own, root))
    return folder


@pytest.fixture
def https(server: str, authority: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the server behind HTTPS."""
    for name in TLS:
        monkeypatch.delenv(name, raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Behind", (Forwarding,), {"behind": server})) as front:
        front.socket = context.wrap_socket(front.socket, server_side=True)
        Thread(target=front.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{front.server_port}"
        front.shutdown()


@pytest.mark.parametrize("variable", TLS)
def test_a_server_with_a_private_certificate_is_trusted_as_mlflow_s_client_is_told_to(
    https: str, authority: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^tracking\.uri={https}: its certificate is not trusted.*\(.*\); MLFLOW_TRACKING_SERVER_CERT_PATH=",
    ) as refused:
        check_store(https)
    assert "local issuer certificate" in str(refused.value) and "\n" not in str(refused.value)
    monkeypatch.setenv(variable, "true" if "INSECURE" in variable else str(authority / "ca.pem"))
    check_store(https)


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_a_run_goes_to_a_server_with_a_private_certificate(
    kdpipe: Callable, https: str, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(kdpipe(*RUN, f"tracking.uri={https}"), "certificate is not trusted")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority / "ca.pem"))
    outcome = kdpipe(*RUN, f"tracking.uri={https}", "tracking.experiment=https")
    assert outcome.status == 0, outcome.errors
    assert f"{https}/#/experiments/" in outcome.output


def test_what_else_is_wrong_with_https_is_said(
    https: str, server: str, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority / "ca.pem"))
    with pytest.raises(ValueError, match=r"is not trusted.*Hostname mismatch, .*'localhost'"):
        check_store(https.replace("127.0.0.1", "localhost"))
    with pytest.raises(ValueError, match=r"or this is no HTTPS server \(.*WRONG_VERSION_NUMBER|record"):
        check_store(server.replace("http:", "https:"))
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "missing.pem")
    with pytest.raises(ValueError, match=r"missing\.pem; MLFLOW_TRACKING_SERVER_CERT_PATH or REQUESTS_CA_BUNDLE names"):
        check_store(https)


def test_a_server_that_is_down_is_refused_at_once_however_often_mlflow_would_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # MLflow's own default: for four minutes
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"no tracking server answers there \(.*refused\)"):
        check_store(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 10


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow server --app-name basic-auth`, with the users admin and guest; guest may read."""
    pytest.importorskip("flask_wtf", reason="MLflow's basic-auth needs it: pip install 'mlflow[auth]'")
    folder, port = tmp_path_factory.mktemp("guarded"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--artifacts-destination", str(folder / "artifacts")]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    environment = {
        **os.environ,
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[PASSWORD],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test",
    }
    with running_server(command, port, folder, environment) as uri:
        with pytest.MonkeyPatch.context() as environment_of_admin:
            for name, value in ADMIN.items():
                environment_of_admin.setenv(name, value)
            guest = {"username": "guest", "password": "the guest's password"}
            made = http_request(get_default_host_creds(uri), "/api/2.0/mlflow/users/create", "POST", json=guest)
            assert made.status_code == 200, made.text
            MlflowClient(uri).create_experiment("readable")
        yield uri


@pytest.mark.faults
def test_runs_go_to_a_server_that_asks_for_a_password(
    kdpipe: Callable, guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ADMIN:
        monkeypatch.delenv(name, raising=False)
    refused = "the server there does not accept this name and password"
    assert_refused(kdpipe(*RUN, f"tracking.uri={guarded}"), refused, f"{NAME} and {PASSWORD} set them")
    wrong = guarded.replace("://", "://admin:wr0ng@")
    assert_refused(kdpipe(*RUN, f"tracking.uri={wrong}"), refused, "admin:PASSWORD@")

    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)
    outcome = kdpipe(*RUN, f"tracking.uri={guarded}", "tracking.experiment=readable")
    assert outcome.status == 0, outcome.errors
    client = MlflowClient(guarded)
    (run,) = client.search_runs([client.get_experiment_by_name("readable").experiment_id])
    assert run.info.status == "FINISHED"
    assert {"model.safetensors"} < {file.path for file in client.list_artifacts(run.info.run_id)}

    monkeypatch.setenv(NAME, "guest")
    monkeypatch.setenv(PASSWORD, "the guest's password")
    allowed = kdpipe(*RUN, "seed=1", f"tracking.uri={guarded}", "tracking.experiment=its own")
    assert allowed.status == 0, allowed.errors
    outcome = kdpipe(*RUN, "seed=1", f"tracking.uri={guarded}", "tracking.experiment=readable")
    assert_refused(outcome, f"tracking.experiment=readable: guest has no permission in {guarded}")
    assert not re.search("guest's|of the admin", allowed.output + allowed.errors)
