"""The command `python -m kdpipe.views`: what a run would see of its first batch, as a picture, without training."""

import argparse
from pathlib import Path

from kdpipe.runs.command_line import folder, run_command
from kdpipe.runs.names import VIEWS


def views_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.views",
        description="Write a picture of 16 images of a run's first batch, as they are stored and as its augmentation "
        "shows them in the first epoch. Nothing is trained.",
    )
    overrides = "those of the run, such as dataset=cifar10 augmentation=trivial_augment seed=1"
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help=overrides)
    parser.add_argument("--out", metavar="FILE", type=folder, default=Path(VIEWS), help="default: %(default)s")
    parser.add_argument("--config-dir", metavar="FOLDER", type=folder, help="of more config files, as for a run")
    return parser.parse_args(words)


def write_views(arguments: argparse.Namespace) -> str:
    """Write the picture, and return a line about it.

    Raises:
        ConfigError: a value that a run would not take.
    """
    # These imports take seconds.
    from kdpipe.assembly.datasets import check_dataset
    from kdpipe.assembly.epoch_views import check_outputs, first_views
    from kdpipe.assembly.parts import build_checked_data
    from kdpipe.evaluation.figures import as_png, draw_views
    from kdpipe.settings.composition import compose_settings, register_resolvers
    from kdpipe.settings.hydra_errors import explain
    from kdpipe.system.files import write_atomically

    register_resolvers()
    try:
        settings = compose_settings(arguments.overrides, arguments.config_dir)
    except Exception as error:
        raise ValueError(explain(error)) from error
    check_dataset(settings.dataset)
    check_outputs(settings)
    stored, seen = first_views(settings, build_checked_data(settings))
    write_atomically(arguments.out, as_png(draw_views(stored, seen)))
    return f"{arguments.out}: {len(seen)} images of {settings.dataset.name}, seed {settings.seed}"


def cli() -> None:
    """`python -m kdpipe.views`."""
    run_command("kdpipe.views", lambda: write_views(views_arguments()))


if __name__ == "__main__":
    cli()
