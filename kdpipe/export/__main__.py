"""The command `python -m kdpipe.export`: a finished run as files that others can use."""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from kdpipe.export.formats import FORMATS, INT8, ONNX
from kdpipe.runs.command_line import (
    add_store_arguments,
    add_wide_argument,
    check_flags,
    existing_store,
    folder,
    run_command,
    table_width,
)
from kdpipe.settings.errors import ConfigError

if TYPE_CHECKING:
    from kdpipe.export.exporting import Export
    from kdpipe.tracking import RunStore

ALIAS = "candidate"  # of a registered model, unless another is given


def export_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.export",
        description="Export the network of a finished run, with its preprocessing, checked against PyTorch and timed.",
    )
    parser.add_argument("run", metavar="RUN", help="id of a finished run, or runs:/<run id>/epoch_<number>")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["onnx"], help="default: onnx (float and int8)")
    parser.add_argument("--out", metavar="DIR", type=folder, required=True, help="new folder for the files")
    parser.add_argument("--root", metavar="FOLDER", help="where the run's images are now (default: where they were)")
    parser.add_argument("--images", type=int, default=1000, help="test images to check on (default: %(default)s)")
    points = "points of accuracy that int8 may lose (default: %(default)g)"
    parser.add_argument("--max-loss", metavar="POINTS", type=float, default=1.0, help=points)
    parser.add_argument("--seconds", type=float, default=20, help="of timing (default: %(default)s)")
    parser.add_argument("--license", metavar="TEXT", help="licence of the weights, for the model card")
    parser.add_argument("--register", metavar="NAME", help="add the ONNX model to MLflow's registry under this name")
    parser.add_argument("--alias", help="for the registered version (default: candidate)")
    parser.add_argument("--register-int8", action="store_true", help="register the int8 model instead of the float one")
    add_wide_argument(parser)
    add_store_arguments(parser)
    return parser.parse_args(words)


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for invalid flags."""
    from pydantic import Field

    from kdpipe.settings.values import NonNegative, PositiveInt

    if arguments.out.exists() or arguments.out.is_symlink():
        raise ConfigError("--out", arguments.out, "the name of a new folder", "this exists")
    check_flags(arguments, images=PositiveInt, seconds=NonNegative, max_loss=Annotated[float, Field(ge=0, le=100)])
    if arguments.register is None and arguments.register_int8:
        raise ConfigError("--register-int8", problem="requires --register NAME")
    if arguments.register is None and arguments.alias is not None:
        raise ConfigError("--alias", arguments.alias, problem="requires --register NAME")
    if arguments.register is not None and "onnx" not in arguments.format:
        raise ConfigError("--register", arguments.register, problem="registers the ONNX model, so add --format onnx")


def export(arguments: argparse.Namespace) -> str:
    """Export a run, and return what to print last.

    Raises:
        ValueError: invalid flags, no such run, no images, or refused files (the others have been written).
    """
    _check_arguments(arguments)
    uri = existing_store(arguments)

    # These imports take seconds, so they come after the quick checks.
    from kdpipe.export.predictor import require_packages

    if "onnx" in arguments.format:
        require_packages("--format onnx", "onnx", "onnxruntime", "onnxscript")
    from kdpipe.export.exporting import export_run
    from kdpipe.export.measurements import table_of
    from kdpipe.export.sources import open_sources
    from kdpipe.system.tables import text_table
    from kdpipe.tracking import RunStore
    from kdpipe.tracking.registry import check_registry

    store = RunStore(uri)
    if arguments.register is not None:
        check_registry(store, arguments.register, arguments.alias or ALIAS)
    with _new_folder(arguments.out) as folder:
        exported = export_run(
            open_sources(arguments.run, store, arguments.root),
            folder,
            arguments.format,
            images=arguments.images,
            max_loss=arguments.max_loss,
            seconds=arguments.seconds,
            license=arguments.license,
        )
        if not exported.files:
            raise ValueError(_refusals(exported))
    optional = ("95 %", "same %", "images/s", "ms, all threads", "difference")
    lines = [text_table(*table_of(exported.measurements), width=table_width(arguments), optional=optional)]
    lines += exported.notes
    lines += [f"written: {arguments.out / name}" for name in sorted(exported.files)]
    print("\n".join(lines), flush=True)
    if arguments.register is not None:
        print(_register(exported, arguments, store), flush=True)
    if exported.refused:
        raise ValueError(_refusals(exported))
    return f"use: python -m kdpipe.predict {shlex.quote(str(arguments.out))} PHOTO.jpg"


def _register(exported: "Export", arguments: argparse.Namespace, store: "RunStore") -> str:
    """Add the ONNX model to MLflow's registry, and return what to print."""
    import numpy as np

    from kdpipe.export.writers import write_answering
    from kdpipe.tracking.registry import register

    name, run = INT8 if arguments.register_int8 else ONNX, exported.sources.run
    if name not in exported.files:
        raise ValueError(f"{_refusals(exported)}; so nothing is registered")
    alias, example = arguments.alias or ALIAS, np.zeros((2, *run.image_shape), np.uint8)
    tags = exported.registry_tags(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        write_answering(arguments.out / name, file)
        return register(store, run.record.id, arguments.register, alias, file, tags, example).summary()


def _refusals(exported: "Export") -> str:
    return "; ".join(f"{name} is refused: {problem}" for name, problem in exported.refused.items())


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, which becomes `out` at the end; a failed or stopped export leaves nothing."""
    with _writing(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)  # readable for others, as new folders are
        for file in folder.iterdir():
            file.chmod(0o666 & ~mask)
        with _writing(out):
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError("--out", out, "the name of a new folder that can be written", str(error.strerror)) from error


def cli() -> None:
    """`python -m kdpipe.export`."""
    # To delete an unfinished folder on SIGTERM, too.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run_command("kdpipe.export", lambda: export(export_arguments()))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    cli()
