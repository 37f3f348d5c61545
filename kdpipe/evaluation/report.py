"""The results of one run as text."""

from collections.abc import Mapping

from kdpipe.runs.names import ONE_THREAD
from kdpipe.system.tables import text_table

BUSY = "the machine was busy with other things: only ratios hold"


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float]) -> str:
    """An epoch as a log line."""
    parts = [f"epoch {epoch}/{epochs}", f"loss {metrics['train/loss']:.4f}"]
    parts += [
        f"{split} {100 * metrics[f'{split}/accuracy']:.1f} %"
        for split in ("train", "val", "test")
        if f"{split}/accuracy" in metrics
    ]
    return "  ".join([*parts, f"{metrics['train/images_per_second']:,.0f} images/s"])


def result_table(metrics: Mapping[str, float]) -> str:
    """The results of a finished run."""
    rows = {
        "test accuracy": f"{100 * metrics['test/accuracy']:.2f} %",
        "test loss": f"{metrics['test/loss']:.4f}",
        "validation accuracy": _percent(metrics, "selected/accuracy"),
        "calibration error": _percent(metrics, "test/ece"),
        "the same, scaled": _scaled(metrics),
        "second student's": _percent(metrics, "peer/accuracy"),
        "teacher's accuracy": _percent(metrics, "teacher/accuracy"),
        "agrees with it": _agreement(metrics),
    }
    return text_table(("", ""), [(title, text) for title, text in rows.items() if text], left=(0, 1))


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
    """The cost of a network, next to its teacher's if it has one, and their ratio: for times the median over rounds in
    which both alternate.

    Args:
        metrics: as `kdpipe.cost` gives them.
        names: of the networks, by "model" and "teacher".
    """
    networks = [network for network in ("teacher", "model") if f"{network}/params" in metrics]
    has_teacher = "teacher" in networks
    rows = []
    for title, name, form in (
        ("parameters", "params", "{:,.0f}"),
        ("size, MB", "size_mb", "{:.3f}"),
        ("operations for an image, MFLOP", "flops", "{:,.1f}"),
        ("activations for an image, MB", "activation_mb", "{:.3f}"),
    ):
        unit = 1e6 if name == "flops" else 1
        values = [metrics[f"{network}/{name}"] for network in networks]
        texts = [form.format(value / unit) for value in values]
        if has_teacher:
            texts.append(f"{values[0] / values[1]:.1f}" if values[1] else "")
        rows.append([title, *texts])
    for suffix, where in ((ONE_THREAD, ", one thread"), ("", "")):
        if f"model/latency_ms{suffix}" not in metrics:
            continue
        latency, rate = [], []
        for network in networks:
            middle, high = (metrics[f"{network}/{name}{suffix}"] for name in ("latency_ms", "latency_p95_ms"))
            latency.append(f"{middle:.2f} ({high:.2f})")
            rate.append(f"{metrics[f'{network}/images_per_second{suffix}']:,.0f}")
        if has_teacher:
            latency.append(f"{metrics[f'speedup/latency{suffix}']:.1f}")
            rate.append(f"{metrics[f'speedup/throughput{suffix}']:.1f}")
        rows += [[f"ms for an image, median (95 %){where}", *latency], [f"images/s, 64 at once{where}", *rate]]
    headings = ["", *(names[network] for network in networks), *(["times less / faster"] if has_teacher else [])]
    table = text_table(headings, rows)
    return f"{table}\n{BUSY}; python -m kdpipe.cost times again" if was_busy(metrics) else table


def was_busy(metrics: Mapping[str, float]) -> bool:
    """Whether other work disturbed the timing: the 95th percentile is far above the median, or all threads are far
    slower than one."""
    names = [name for name in metrics if "/latency_ms" in name]
    slow = any(metrics.get(name.replace("_ms", "_p95_ms"), 0) > 4 * metrics[name] for name in names)
    return slow or any(metrics.get(name.removesuffix(ONE_THREAD), 0) > 2 * metrics[name] for name in names)
