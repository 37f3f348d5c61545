"""The command `kdpipe-compare`, or `python -m kdpipe.compare`."""

import argparse
import sys
from dataclasses import replace
from typing import get_args

from kdpipe.runs.command_line import (
    add_store_arguments,
    add_wide_argument,
    existing_store,
    folder,
    run_command,
    table_width,
)
from kdpipe.settings.errors import ConfigError
from kdpipe.settings.metric_names import METRICS, Select
from kdpipe.system.tables import UNLIMITED


def _parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdpipe-compare",
        description="Compare the finished runs of an experiment, and say whether distillation helped.",
    )
    parser.add_argument("--experiment", default="kdpipe", help="MLflow experiment (default: %(default)s)")
    parser.add_argument("--sweep", metavar="ID", help="only the runs of a sweep, and students alone from elsewhere")
    parser.add_argument("--where", metavar="KEY=VALUE", action="append", default=[], help="leave out other values")
    parser.add_argument("--mixed", action="store_true", help="compare each kind of data, budget and teacher by itself")
    parser.add_argument("--sort", choices=("gain",), help="sort the rows by it, the largest first")
    parser.add_argument("--published", action="store_true", help="add published accuracies of experiment=benchmark/…")
    parser.add_argument(
        "--runs", metavar="FILE", type=folder, help="runs of --format runs, in place of those of a store"
    )
    parser.add_argument(
        "--epoch", metavar="N", type=int, help="students as they were after N epochs (needs train.test_each_epoch)"
    )
    parser.add_argument("--select", choices=get_args(Select), help="weights of the students (default: as selected)")
    parser.add_argument(
        "--metric", choices=METRICS, help="what chooses and judges the best student (default: the runs' train.metric)"
    )
    formats = ("table", "csv", "json", "html", "runs")
    parser.add_argument("--format", choices=formats, default="table", help="default: %(default)s")
    parser.add_argument(
        "--out", metavar="DIR", type=folder, help="write to this folder, with plots, instead of printing"
    )
    add_wide_argument(parser)
    add_store_arguments(parser)
    return parser.parse_args(words)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for arguments that do not go together."""
    if arguments.sweep is not None and arguments.mixed:
        raise ConfigError("--mixed", problem="not with --sweep, which compares each kind by itself anyway")
    if arguments.runs is not None and arguments.sweep is not None:
        raise ConfigError("--sweep", arguments.sweep, problem="not with --runs, which has no sweeps")
    if arguments.epoch is not None and arguments.epoch < 1:
        raise ConfigError("--epoch", arguments.epoch, "a whole number from 1")
    for option, value in {"--epoch": arguments.epoch, "--select": arguments.select}.items():
        if value and (arguments.sweep is not None or arguments.format == "runs"):
            raise ConfigError(
                option, value, problem="not with --sweep and --format runs, which have runs as they ended"
            )
    if arguments.published and arguments.metric not in (None, "accuracy"):
        raise ConfigError("--metric", arguments.metric, "accuracy", "published numbers are accuracies (--published)")
    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigError("--out", arguments.out, "a folder", "this is a file")


def run_comparison(words: list[str] | None = None) -> str:
    """Run the command with these arguments (default: the command line's); the text to print. Raises ValueError if there
    is no store or no run, or if the runs cannot be compared."""
    arguments = _parse(words)
    where = dict(map(_pair, arguments.where))
    if len(where) < len(arguments.where):
        raise ConfigError("--where", " --where ".join(arguments.where), "one value for each key")
    _check(arguments)
    uri = "" if arguments.runs else existing_store(arguments)

    # Seconds of imports, after what can fail sooner.
    from kdpipe.compare import comparison_table, frames
    from kdpipe.compare.comparison import by_gain
    from kdpipe.compare.loading import draw_pictures, load_comparisons, load_sweep, open_experiment
    from kdpipe.compare.other_weights import OtherWeights
    from kdpipe.compare.published import NONE_PUBLISHED
    from kdpipe.compare.records import RunFile, RunSource, runs_to_csv

    source: RunSource
    if arguments.runs:
        source = RunFile(arguments.runs)
    else:
        source = tracker = open_experiment(uri, arguments.experiment, arguments.output_dir)
    if arguments.epoch or arguments.select:
        source = OtherWeights(source, arguments.epoch, arguments.select)
    if arguments.sweep is not None:
        comparisons = load_sweep(tracker, arguments.sweep, where, arguments.published, arguments.metric)
    else:
        comparisons = load_comparisons(source, where, arguments.mixed, arguments.published, arguments.metric)
    if arguments.sort:
        comparisons = [replace(found, rows=by_gain(found.rows)) for found in comparisons]
    pictures = []
    if arguments.format == "html" or (arguments.out and arguments.format != "runs"):
        pictures = [draw_pictures(comparison, source) for comparison in comparisons]
    match arguments.format:
        case "csv":
            text = frames.to_csv(comparisons)
            if any(NONE_PUBLISHED in comparison.notes for comparison in comparisons):
                print(NONE_PUBLISHED, file=sys.stderr)  # a note in the other formats
        case "json":
            text = frames.to_json(comparisons)
        case "runs":
            rows = [row for found in comparisons for row in (*found.rows, found.confirmed) if row]
            text = runs_to_csv([run for row in rows for run in row.cell.runs.values()], source)
        case "html":
            title = f"sweep {arguments.sweep}" if arguments.sweep else arguments.experiment
            text = comparison_table.to_html(title, comparisons, pictures)
        case _:
            width = UNLIMITED if arguments.out else table_width(arguments)  # a file has all
            text = "\n\n".join(comparison_table.to_text(comparison, width) for comparison in comparisons)
    if not arguments.out:
        return text
    suffix = arguments.format.replace("table", "txt")
    written_to = "runs.csv" if arguments.format == "runs" else f"comparison.{suffix}"
    files = {written_to: text.encode(), **comparison_table.picture_files(pictures)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (arguments.out / name).write_bytes(content)
    written = [f"written: {arguments.out / name}" for name in files]
    return "\n".join([*written, *(f"verdict: {comparison.verdict}" for comparison in comparisons)])


def _pair(condition: str) -> tuple[str, str]:
    key, equals, value = condition.partition("=")
    if not (key and equals):
        raise ConfigError("--where", condition, "KEY=VALUE, such as train.epochs=10")
    return key, value


def cli() -> None:
    """Run the command line."""
    run_command("kdpipe-compare", run_comparison)


if __name__ == "__main__":
    cli()
