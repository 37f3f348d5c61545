"""A search's pictures, as Optuna draws them."""

import warnings
from collections.abc import Callable
from typing import Any

from optuna.study import Study

from kdpipe.system.optional import no_windows


def study_pictures(study: Study) -> dict[str, bytes]:
    """PNG files by name: the metric's history, how much each setting matters, and the metric over alpha and
    temperature; with two goals the Pareto front. What there are too few trials for is left out."""
    with no_windows():
        import matplotlib as mpl

        mpl.use("Agg")
        from optuna.visualization import matplotlib as drawn

    metric = "validation metric"
    if len(study.directions) > 1:
        names = [metric, "milliseconds for one image"]
        return _drawn({"search_pareto.png": lambda: drawn.plot_pareto_front(study, target_names=names)})
    pictures: dict[str, Callable[[], Any]] = {
        "search_history.png": lambda: drawn.plot_optimization_history(study, target_name=metric),
        "search_importance.png": lambda: drawn.plot_param_importances(study, target_name=metric),
    }
    chosen = {name for trial in study.get_trials(deepcopy=False) for name in trial.params}
    if {"loss.alpha", "loss.temperature"} <= chosen:
        pair = ["loss.alpha", "loss.temperature"]
        pictures["search_contour.png"] = lambda: drawn.plot_contour(study, pair, target_name=metric)
    return _drawn(pictures)


def _drawn(pictures: dict[str, Callable[[], Any]]) -> dict[str, bytes]:
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kdpipe.evaluation.figures import as_png

    files = {}
    for name, draw in pictures.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's pictures are experimental
            try:
                axes = draw()
            except (ValueError, RuntimeError):  # such as importances of a single trial
                continue
        figure = (axes if isinstance(axes, Axes) else axes.flat[0]).figure
        assert isinstance(figure, Figure)
        files[name] = as_png(figure)
        pyplot.close("all")
    return files
