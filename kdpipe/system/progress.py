"""A progress bar on a terminal; nothing in a log file or a pipe."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

NOTE_SECONDS = 0.5  # between two notes, since each may have to wait for the device


class Bar:
    """A bar with a note next to it, such as the current loss."""

    def __init__(self, bars: Progress, description: str, total: int) -> None:
        self._bars = bars
        self._task = bars.add_task(description, total=total, note="")
        self._noted = time.monotonic()

    def advance(self, images: int) -> None:
        self._bars.advance(self._task, images)

    def wants_note(self) -> bool:
        """Whether the bar is visible and its note is old."""
        return not self._bars.disable and time.monotonic() - self._noted > NOTE_SECONDS

    def note(self, text: str) -> None:
        self._noted = time.monotonic()
        self._bars.update(self._task, note=text)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar]:
    """A bar over `total` images that disappears at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"),
        _Speed(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stdout)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield Bar(bars, description, total)
