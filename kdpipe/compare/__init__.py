"""The comparison of finished runs, and whether distillation helped: `python -m kdpipe.compare`, or in Python

    for comparison in kdpipe.compare.compare_runs("demo"):
        print(comparison.verdict)
        comparison.frame  # pandas, a row for each cell

`loading` reads runs from MLflow, `cells` groups them by seed, `comparison` pairs students and judges with `statistics`,
`comparison_table`, `frames` and `plots` show the result.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.runs.command_line import existing_store
from kdpipe.settings.errors import ConfigError

if TYPE_CHECKING:
    from kdpipe.compare.comparison import Comparison
    from kdpipe.settings.metric_names import Metric, Select


def compare_runs(
    experiment: str = "kdpipe",
    sweep: str | None = None,
    *,
    where: Mapping[str, str] | None = None,
    mixed: bool = False,
    published: bool = False,
    epoch: int | None = None,
    select: "Select | None" = None,
    metric: "Metric | None" = None,
    uri: str | None = None,
    output_dir: str | Path = "outputs",
) -> "list[Comparison]":
    """Compare the finished runs of an experiment: one comparison, or several with `sweep` or `mixed`. Raises ValueError
    if there is no store or no finished run, or if the runs cannot be compared.

    Args:
        experiment: name of the MLflow experiment.
        sweep: id of a sweep; compares its runs only, each data set and budget by itself.
        where: settings by key; runs with another value are left out.
        mixed: allow students of different data, budgets or teachers in an experiment, and compare each kind by itself.
        published: add published accuracies.
        epoch: students as they were after this epoch, of runs with `train.test_each_epoch`; not with `sweep`.
        select: students with these weights (default: those that each run selected); not with `sweep`.
        metric: "accuracy", "balanced_accuracy" or "macro_f1", by which the best student is chosen (on validation
            images) and judged (on test images); by default that of the runs, `train.metric`.
        uri: the MLflow store (default: MLFLOW_TRACKING_URI, else mlflow.db in `output_dir`).
        output_dir: where the runs were written.
    """
    if sweep is not None and (epoch or select):
        raise ConfigError("sweep", sweep, problem="not with epoch and select: a sweep has its runs as they ended")
    output_dir = Path(output_dir).expanduser()
    store = existing_store(argparse.Namespace(uri=uri, output_dir=output_dir))

    # They import mlflow, which takes seconds.
    from kdpipe.compare.loading import load_comparisons, load_sweep, open_experiment
    from kdpipe.compare.other_weights import OtherWeights

    tracker = open_experiment(store, experiment, output_dir)
    if sweep is not None:
        return load_sweep(tracker, sweep, where or {}, published, metric)
    source = OtherWeights(tracker, epoch, select) if epoch or select else tracker
    return load_comparisons(source, where or {}, mixed, published, metric)
