"""MLflow: the only code that imports it.

A run writes to its folder (`runs.journal`), and a thread delivers to the store: a server that hangs or dies does not
hold up training, and gets what it missed when it is back.
"""

import os

# MLflow's own defaults retry a dead server for minutes. Set before it is imported: it reads them once.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # they are for large files

from kdpipe.tracking.delivery import ActiveRun, Recovery
from kdpipe.tracking.run_store import RunRecord, RunStore
from kdpipe.tracking.tracker import MAX_PARAM_LENGTH, Tracker

__all__ = ["MAX_PARAM_LENGTH", "ActiveRun", "Recovery", "RunRecord", "RunStore", "Tracker"]
