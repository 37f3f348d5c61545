"""Which MLflow store a run goes to, and whether it can be reached: known before mlflow, slow to import, is."""

import logging
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

log = logging.getLogger("kdpipe")

WEIGHTS = "model.safetensors"  # a run's weights, in its folder and among its artifacts
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def store_uri(configured: str | None, output_dir: Path) -> str:
    """Which store: what is configured, else MLFLOW_TRACKING_URI, else a sqlite file in the output folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_dir.resolve() / 'mlflow.db'}"


def wait_for_store(uri: str, seconds: float) -> None:
    """`check_uri` for a store that was there before: it may be back within some time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check_uri(uri)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("%s: waiting for it", error)
            time.sleep(min(15.0, seconds))


def check_uri(uri: str) -> None:
    """Raise ValueError, within seconds, for a URI of no known kind and for a server that does not answer."""
    scheme = uri.split(":", 1)[0].split("+")[0] if ":" in uri else ""
    if scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(
                f"tracking.uri={uri}: no tracking server answers there ({reason}); start it, or use sqlite:///FILE"
            ) from error
    elif scheme not in DATABASES:
        raise ValueError(f"tracking.uri={uri}: sqlite:///FILE, postgresql://… or http://HOST:PORT is accepted")
