"""The MLflow store that the settings name."""

from pathlib import Path

from kdpipe.runs.store_address import PATIENCE, check_uri, store_uri
from kdpipe.settings.schema import Settings


def reach_store(settings: Settings) -> str:
    """The URI of the store, which answers. A run of a sweep waits for it: it was up when the sweep began.

    Raises:
        ConfigError: it is none, or does not answer.
    """
    uri = store_uri(settings.tracking.uri, Path(settings.output_dir))
    if uri.startswith("sqlite"):
        check_uri(uri)
    else:
        from kdpipe.tracking.server import wait_for_store  # imports mlflow, which takes seconds

        wait_for_store(uri, PATIENCE if settings.sweep.job else 0)
    return uri
