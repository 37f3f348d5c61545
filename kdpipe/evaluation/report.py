"""The results of one run as text."""

from collections.abc import Mapping

from kdpipe.runs.names import ONE_THREAD
from kdpipe.settings.metric_names import METRICS, Metric
from kdpipe.system.tables import text_table

BUSY = "the machine was busy with other things: only ratios hold"


def epoch_line(epoch: int, epochs: int, metrics: Mapping[str, float], chosen_by: Metric = "accuracy") -> str:
    """An epoch as a log line, with the metric that weights are chosen by."""
    parts = [f"epoch {epoch}/{epochs}", f"loss {metrics['train/loss']:.4f}"]
    parts += [
        f"{split} {100 * metrics[f'{split}/accuracy']:.1f} %"
        for split in ("train", "val", "test")
        if f"{split}/accuracy" in metrics
    ]
    if chosen_by != "accuracy" and (value := metrics.get(f"val/{chosen_by}")) is not None:
        parts.append(f"val {METRICS[chosen_by]} {100 * value:.1f} %")
    return "  ".join([*parts, f"{metrics['train/images_per_second']:,.0f} images/s"])


def result_table(metrics: Mapping[str, float], width: int | None = None, chosen_by: Metric = "accuracy") -> str:
    """The results of a finished run, with the metric that weights are chosen by. With as many test images of each class
    the balanced accuracy is the accuracy, and is left out."""

    def percent(name: str) -> str:
        return f"{100 * metrics[name]:.2f} %" if name in metrics else ""

    is_skewed = chosen_by != "accuracy" or percent("test/balanced_accuracy") != percent("test/accuracy")
    scaled, where_wrong = percent("test/ece_scaled"), percent("teacher/agreement_where_wrong")
    rows = {
        "test accuracy": percent("test/accuracy"),
        **{f"test {METRICS[name]}": percent(f"test/{name}") for name in ("balanced_accuracy", "macro_f1") if is_skewed},
        "test loss": f"{metrics['test/loss']:.4f}",
        "validation accuracy": percent("selected/accuracy"),
        f"validation {METRICS[chosen_by]}": percent(f"selected/{chosen_by}"),
        "calibration error": percent("test/ece"),
        "the same, scaled": scaled and f"{scaled} (probabilities at temperature {metrics['model/temperature']:.2f})",
        "second student's": percent("peer/accuracy"),
        "teacher's accuracy": percent("teacher/accuracy"),
        "teacher's, validation": percent("teacher/val_accuracy"),
        "agrees with it": percent("teacher/agreement") + (where_wrong and f" (where it is wrong: {where_wrong})"),
    }
    return text_table(("", ""), [(title, text) for title, text in rows.items() if text], left=(0, 1), width=width)


def cost_table(metrics: Mapping[str, float], names: Mapping[str, str], width: int | None = None) -> str:
    """The cost of a network, next to its teacher's if it has one, and their ratio: for times the median over rounds in
    which both alternate. `names` of the networks are by "model" and "teacher"."""
    networks = [network for network in ("teacher", "model") if f"{network}/params" in metrics]
    has_teacher = "teacher" in networks
    rows = []
    for title, name, form, unit in (
        ("parameters", "params", ",.0f", 1),
        ("size, MB", "size_mb", ".3f", 1),
        ("operations for an image, MFLOP", "flops", ",.1f", 1e6),
        ("activations for an image, MB", "activation_mb", ".3f", 1),
    ):
        values = [metrics[f"{network}/{name}"] for network in networks if f"{network}/{name}" in metrics]
        if len(values) < len(networks):  # it could not be counted
            continue
        ratio = [f"{values[0] / values[1]:.1f}" if values[1] else ""] if has_teacher else []
        rows.append([title, *(f"{value / unit:{form}}" for value in values), *ratio])
    times = ("latency_ms", "latency_p95_ms", "images_per_second")
    for suffix, where in ((ONE_THREAD, ", one thread"), ("", "")):
        if f"model/latency_ms{suffix}" not in metrics:
            continue
        middles, highs, rates = ([metrics[f"{network}/{name}{suffix}"] for network in networks] for name in times)
        latency = [f"{middle:.2f} ({high:.2f})" for middle, high in zip(middles, highs, strict=True)]
        rate = [f"{images:,.0f}" for images in rates]
        if has_teacher:
            latency.append(f"{metrics[f'speedup/latency{suffix}']:.1f}")
            rate.append(f"{metrics[f'speedup/throughput{suffix}']:.1f}")
        rows += [[f"ms for an image, median (95 %){where}", *latency], [f"images/s, 64 at once{where}", *rate]]
    last = "times less / faster"
    headings = ["", *(names[network] for network in networks), *([last] if has_teacher else [])]
    short = {" for an image": "", ", median (95 %)": "", "operations, MFLOP": "MFLOP", "64 at once": "64 at a time"}
    table = text_table(headings, rows, width=width, optional=[last], short=short)
    return f"{table}\n{BUSY}; python -m kdpipe.cost times again" if was_busy(metrics) else table


def was_busy(metrics: Mapping[str, float]) -> bool:
    """Whether other work disturbed the timing: the 95th percentile is far above the median, or all threads are far
    slower than one."""
    names = [name for name in metrics if "/latency_ms" in name]
    slow = any(metrics.get(name.replace("_ms", "_p95_ms"), 0) > 4 * metrics[name] for name in names)
    return slow or any(metrics.get(name.removesuffix(ONE_THREAD), 0) > 2 * metrics[name] for name in names)
