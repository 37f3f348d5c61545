"""Results as text."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kdpipe.runs.names import ONE_THREAD

BUSY = "the machine was busy with other things: only ratios hold"


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
    told = {
        "test accuracy": f"{100 * metrics['test/accuracy']:.2f} %",
        "test loss": f"{metrics['test/loss']:.4f}",
        "validation accuracy": _percent(metrics, "selected/accuracy"),
        "calibration error": _percent(metrics, "test/ece"),
        "the same, scaled": _scaled(metrics),
        "second student's": _percent(metrics, "peer/accuracy"),
        "teacher's accuracy": _percent(metrics, "teacher/accuracy"),
        "agrees with it": _agreement(metrics),
    }
    for title, text in told.items():
        if text:
            table.add_row(title, text)
    return render(table)


def _percent(metrics: Mapping[str, float], name: str) -> str:
    return f"{100 * metrics[name]:.2f} %" if name in metrics else ""


def _scaled(metrics: Mapping[str, float]) -> str:
    if "test/ece_scaled" not in metrics:
        return ""
    return f"{_percent(metrics, 'test/ece_scaled')} (probabilities at temperature {metrics['model/temperature']:.2f})"


def _agreement(metrics: Mapping[str, float]) -> str:
    if "teacher/agreement" not in metrics:
        return ""
    where_wrong = _percent(metrics, "teacher/agreement_where_wrong")
    return _percent(metrics, "teacher/agreement") + (f" (where it is wrong: {where_wrong})" if where_wrong else "")


def cost_table(metrics: Mapping[str, float], names: Mapping[str, str]) -> str:
    """What a network costs, beside its teacher where it has one, and how many times less: of times the median over
    rounds, in which both took turns.

    Args:
        metrics: as `kdpipe.cost` gives them.
        names: of the networks, under "model" and "teacher".
    """
    networks = [network for network in ("teacher", "model") if f"{network}/params" in metrics]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for network in networks:
        table.add_column(names[network], justify="right")
    if "teacher" in networks:
        table.add_column("times less / faster", justify="right")
    for title, name, form in (
        ("parameters", "params", "{:,.0f}"),
        ("size, MB", "size_mb", "{:.3f}"),
        ("operations for an image, MFLOP", "flops", "{:,.1f}"),
        ("activations for an image, MB", "activation_mb", "{:.3f}"),
    ):
        unit = 1e6 if name == "flops" else 1
        values = [metrics[f"{network}/{name}"] for network in networks]
        texts = [form.format(value / unit) for value in values]
        if "teacher" in networks:
            texts.append(f"{values[0] / values[1]:.1f}" if values[1] else "")
        table.add_row(title, *texts)
    for suffix, where in ((ONE_THREAD, ", one thread"), ("", "")):
        if f"model/latency_ms{suffix}" in metrics:
            _add_times(table, metrics, networks, suffix, where)
    return "\n".join([render(table), *([f"{BUSY}; python -m kdpipe.cost times again"] if was_busy(metrics) else [])])


def was_busy(metrics: Mapping[str, float]) -> bool:
    """Whether other work has disturbed the timing: one in twenty images took far longer than half of them, or all
    threads far longer than one."""
    names = [name for name in metrics if "/latency_ms" in name]
    slow = any(metrics.get(name.replace("_ms", "_p95_ms"), 0) > 4 * metrics[name] for name in names)
    return slow or any(metrics.get(name.removesuffix(ONE_THREAD), 0) > 2 * metrics[name] for name in names)


def _add_times(table: Table, metrics: Mapping[str, float], networks: Sequence[str], suffix: str, where: str) -> None:
    latency, rate = [], []
    for network in networks:
        middle, high = (metrics[f"{network}/{name}{suffix}"] for name in ("latency_ms", "latency_p95_ms"))
        latency.append(f"{middle:.2f} ({high:.2f})")
        rate.append(f"{metrics[f'{network}/images_per_second{suffix}']:,.0f}")
    if "teacher" in networks:
        latency.append(f"{metrics[f'speedup/latency{suffix}']:.1f}")
        rate.append(f"{metrics[f'speedup/throughput{suffix}']:.1f}")
    table.add_row(f"ms for an image, median (95 %){where}", *latency)
    table.add_row(f"images/s, 64 at once{where}", *rate)


def render(table: Table) -> str:
    """A table as plain text, too wide rather than cut."""
    console = Console(width=1000, color_system=None, markup=False, emoji=False)  # names may hold [brackets], :cat:
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().split("\n") if line.strip())
