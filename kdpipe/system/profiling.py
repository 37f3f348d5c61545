"""A profile of a few training steps."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("kdpipe")

TRACE = "trace.json.gz"  # for chrome://tracing or https://ui.perfetto.dev
TABLE = "profile.txt"  # the slowest operators
SKIPPED, WARM_UP, RECORDED = 10, 2, 5  # steps


@contextmanager
def step_profiler(folder: Path, enabled: bool, device: torch.device) -> Iterator[Callable[[], None]]:
    """A function to call after each training step; a few of the steps are profiled, into files in `folder`."""
    for name in (TRACE, TABLE):
        (folder / name).unlink(missing_ok=True)
    if not enabled:
        yield lambda: None
        return

    def write(finished: profile) -> None:
        finished.export_chrome_trace(str(folder / TRACE))
        averages = finished.key_averages(group_by_input_shape=True)
        (folder / TABLE).write_text(f"{averages.table(sort_by=f'self_{device.type}_time_total', row_limit=25)}\n")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True) as running:
        yield running.step
    if not profile_files(folder):
        log.warning("train.profile=true: no trace, the run had fewer than %d steps", SKIPPED + WARM_UP + RECORDED)


def profile_files(folder: Path) -> list[Path]:
    """The files that `step_profiler` wrote."""
    return [folder / name for name in (TRACE, TABLE) if (folder / name).exists()]
