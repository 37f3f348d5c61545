"""MLflow: the only code that imports it.

A run writes to its folder (`runs.journal`), and a thread tells the store: a server that hangs, dies or comes back
keeps no training waiting, and what it missed it is told later.
"""

import os

# MLflow's own defaults retry a dead server for minutes. Set before it is imported: it reads them once.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one small file needs none

from kdpipe.tracking.delivery import Run, Stores
from kdpipe.tracking.runs import RunRecord, RunStore
from kdpipe.tracking.tracker import MAX_PARAM_LENGTH, Tracker

__all__ = ["MAX_PARAM_LENGTH", "Run", "RunRecord", "RunStore", "Stores", "Tracker"]
