"""Results as text."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    """One epoch in a log."""
    parts = [f"epoch {epoch}/{epochs}", f"loss {metrics['train/loss']:.4f}"]
    parts += [
        f"{split} {100 * metrics[f'{split}/accuracy']:.1f} %"
        for split in ("train", "val", "test")
        if f"{split}/accuracy" in metrics
    ]
    return "  ".join([*parts, f"{metrics['train/images_per_second']:,.0f} images/s"])


def result_table(metrics: Mapping[str, float]) -> str:
    """What a finished run came to."""
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_row("test accuracy", f"{100 * metrics['test/accuracy']:.2f} %")
    table.add_row("test loss", f"{metrics['test/loss']:.4f}")
    if "selected/accuracy" in metrics:
        table.add_row("validation accuracy", f"{100 * metrics['selected/accuracy']:.2f} %")
    table.add_row("parameters", f"{metrics['model/params']:,.0f}")
    table.add_row("size", f"{metrics['model/size_mb']:.3f} MB")
    if "peer/accuracy" in metrics:
        table.add_row("second student's", f"{100 * metrics['peer/accuracy']:.2f} %")
    elif "teacher/size_mb" in metrics:
        reduction = 1 - metrics["model/size_mb"] / metrics["teacher/size_mb"]
        table.add_row(
            "teacher's size", f"{metrics['teacher/size_mb']:.3f} MB ({100 * reduction:.1f} % smaller than it)"
        )
    return render(table)


def render(table: Table) -> str:
    """A table as plain text, too wide rather than cut."""
    console = Console(width=1000, color_system=None, markup=False)  # names may hold [brackets]
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())
