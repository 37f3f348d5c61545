"""The command `kdpipe-compare`, or `python -m kdpipe.compare`."""

import argparse
import sys
from pathlib import Path

from kdpipe.runs.command_line import add_store_arguments, existing_store, run_command

FORMATS = ("table", "csv", "json", "html")


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdpipe-compare",
        description="The finished runs of an experiment side by side, and whether distillation helped.",
    )
    parser.add_argument("--experiment", default="kdpipe", help="MLflow experiment (default: %(default)s)")
    parser.add_argument("--sweep", metavar="ID", help="only the runs of a sweep, and the student alone from anywhere")
    parser.add_argument(
        "--where", metavar="KEY=VALUE", action="append", default=[], help="leave out runs that have another value there"
    )
    parser.add_argument(
        "--mixed", action="store_true", help="students of different data, budgets or teachers: each kind by itself"
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="beside the accuracies those of the papers, for what experiment=benchmark/… trains",
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write there, with the pictures, instead of printing")
    add_store_arguments(parser)
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> str:
    """The comparison that was asked for, as text, or what was written where.

    Raises:
        ValueError: no store, no runs, or runs that cannot be compared.
    """
    pairs = [_pair(condition) for condition in arguments.where]
    where = dict(pairs)
    if len(where) < len(pairs):
        raise ValueError(f"--where {' --where '.join(arguments.where)}: one value for a key is accepted")
    if arguments.sweep is not None and arguments.mixed:
        raise ValueError("--mixed: not with --sweep, which takes each data set and budget of its grid by itself anyway")
    uri = existing_store(arguments)
    if arguments.out and arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out}: a folder is accepted, this is a file")

    # Seconds of imports, after what can fail sooner.
    from kdpipe.compare import rendering as formats
    from kdpipe.compare.comparison import with_published
    from kdpipe.compare.loading import compare_experiment, compare_sweep, image_by_image, pictures_of, run_finder
    from kdpipe.compare.published import NONE_PUBLISHED
    from kdpipe.tracking import Tracker

    tracker = Tracker(uri, arguments.experiment, arguments.output_dir / "mlartifacts", create=False)
    tracker.settle_all(arguments.output_dir / "runs")
    if arguments.sweep is not None:
        comparisons = compare_sweep(tracker, arguments.sweep, where)
    else:
        comparisons = compare_experiment(tracker, where, arguments.mixed)
    if arguments.published:
        comparisons = [with_published(comparison, run_finder(tracker)) for comparison in comparisons]
        found = any(row.published for comparison in comparisons for row in comparison.rows)
        if arguments.format == "csv" and not found:  # the other formats have notes
            print(NONE_PUBLISHED, file=sys.stderr)
    if arguments.format in ("table", "json", "html"):
        comparisons = [image_by_image(comparison, tracker) for comparison in comparisons]
    title = f"sweep {arguments.sweep}" if arguments.sweep else arguments.experiment
    drawn = []
    if arguments.out or arguments.format == "html":
        drawn = [pictures_of(comparison, tracker) for comparison in comparisons]
    text = {
        "table": lambda: "\n\n".join(map(formats.as_table, comparisons)),
        "csv": lambda: formats.as_csv(comparisons),
        "json": lambda: formats.as_json(comparisons),
        "html": lambda: formats.as_html(title, comparisons, drawn),
    }[arguments.format]()
    if not arguments.out:
        return text
    suffix = arguments.format.replace("table", "txt")
    files = {f"comparison.{suffix}": text.encode(), **formats.numbered(drawn)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (arguments.out / name).write_bytes(content)
    written = [f"written: {arguments.out / name}" for name in files]
    return "\n".join([*written, *(f"verdict: {comparison.verdict}" for comparison in comparisons)])


def _pair(condition: str) -> tuple[str, str]:
    key, equals, value = condition.partition("=")
    if not (key and equals):
        raise ValueError(f"--where {condition}: KEY=VALUE is accepted, such as train.epochs=10")
    return key, value


def cli() -> None:
    """`kdpipe-compare` and `python -m kdpipe.compare`."""
    run_command("kdpipe-compare", lambda: run(arguments_of()))


if __name__ == "__main__":
    cli()
