"""Progress of a run, a bar on a terminal and nothing in a log file or a pipe; and of the jobs of a sweep.

Jobs may be processes side by side, or on other machines, so each one reports to a file. The process that started them
watches the files, and is the only one that writes to the terminal: the lines of all jobs, and one bar.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

NOTE_SECONDS = 0.5  # between two notes, since each may have to wait for the device
IS_OVER = {"share": 1.0}  # `extra` of a job's last log record
WATCH_SECONDS = 0.2  # between two looks at what jobs report


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
    """A bar over `total` images that disappears at the end; none in a job that reports."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"),
        _Speed(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stdout)
    disable = _Report.is_open or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as bars:
        yield Bar(bars, description, total)


class _Report(logging.Handler):
    """Writes a line of JSON for each log record that is for the eyes of a user: `text`, and the `share` of the job that
    is done, where the record has one."""

    is_open = False  # in this process

    def __init__(self, file: Path, logger: str) -> None:
        super().__init__()
        self._file, self._logger = file, logger

    def emit(self, record: logging.LogRecord) -> None:
        share = getattr(record, "share", None)
        is_shown = record.levelno > logging.INFO or record.name == self._logger
        if not is_shown and share is None:
            return
        try:
            text = f"[{time.strftime('%H:%M:%S')}] %s: {record.getMessage()}"
            entry = {"text": text.splitlines()[0] if is_shown else "", "share": share}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except Exception:  # such as of a full disk, which is no reason to end a run
            self.handleError(record)


def report_file(folder: Path, number: int) -> Path:
    """The file of the job with this number."""
    return folder / f"{number}.jsonl"


@contextmanager
def report(file: Path, logger: str) -> Iterator[None]:
    """In a job, within the block: what `logger` says, and all warnings, go to a file instead of the terminal, and there
    are no bars. A record's `extra={"share": 0.5}` says how much of the job is done, 1 that it is over."""
    root = logging.getLogger()
    before = list(root.handlers)
    root.handlers = [handler for handler in before if isinstance(handler, logging.FileHandler)]
    root.addHandler(_Report(file, logger))
    _Report.is_open = True
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        _Report.is_open = False
        root.handlers = before


class _Watch:
    """Of several jobs: what they report, and how far they are."""

    def __init__(self, files: Sequence[Path], names: Sequence[str], sizes: Sequence[float]) -> None:
        self._files, self._names, self._sizes = files, names, sizes
        self._read = [0] * len(files)  # bytes
        self._shares = [0.0] * len(files)
        self._over = [False] * len(files)
        self._started = time.monotonic()
        self.console = Console(file=sys.stdout, soft_wrap=True)
        columns = (
            *(TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%")),
            *(TextColumn("{task.fields[note]}"), TimeRemainingColumn()),
        )
        self.bars = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self.bars.add_task("all runs", total=sum(sizes), note="")

    def show_news(self) -> None:
        """Print what was reported since the last time."""
        for number, file in enumerate(self._files):
            for entry in self._news(number, file):
                if entry["share"] is not None:
                    self._shares[number] = max(self._shares[number], entry["share"])
                    self._over[number] |= entry["share"] >= 1 and bool(entry["text"])
                if entry["text"]:
                    place = f"[{number + 1}/{len(self._files)}] {self._names[number]}"
                    end = f" ({self._remaining()})" if entry["share"] is not None else ""
                    self.console.print(entry["text"].replace("%s", place, 1) + end, markup=False, highlight=False)
        self.bars.update(self._task, completed=self._done(), note=f"{sum(self._over)} of {len(self._files)} done")

    def _news(self, number: int, file: Path) -> list[dict[str, Any]]:
        """The complete lines of a file that are new."""
        try:
            with file.open("rb") as opened:
                opened.seek(self._read[number])
                content = opened.read()
        except OSError:  # not begun
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read[number] += len(whole)
        entries = []
        for line in whole.splitlines():
            with suppress(ValueError):  # written in part, on a full disk
                entries.append(json.loads(line))
        return entries

    def _done(self) -> float:
        return sum(share * size for share, size in zip(self._shares, self._sizes, strict=True))

    def _remaining(self) -> str:
        """How many jobs are over, and about how long the others will take."""
        text = f"{sum(self._over)} of {len(self._files)} done"
        if all(self._over):
            return text
        left = (time.monotonic() - self._started) * (sum(self._sizes) / self._done() - 1)
        return f"{text}, {f'about {duration(left)}' if left > 5 else 'a few seconds'} left"


@contextmanager
def watch(files: Sequence[Path], names: Sequence[str], sizes: Sequence[float]) -> Iterator[None]:
    """Show what jobs `report` within the block, each line with its job's name.

    Args:
        files: of the jobs.
        sizes: how much work each is, in any unit.
    """
    watched, is_over = _Watch(files, names, sizes), threading.Event()

    def keep_showing() -> None:
        while not is_over.wait(WATCH_SECONDS):
            watched.show_news()

    thread = threading.Thread(target=keep_showing, name="kdpipe-watch", daemon=True)
    with watched.bars:
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            watched.show_news()


def duration(seconds: float) -> str:
    """40 s, 4 min, 1 h 10 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
