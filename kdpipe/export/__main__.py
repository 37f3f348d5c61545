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
from typing import TYPE_CHECKING

from kdpipe.runs.command_line import add_store_arguments, existing_store, run_command

if TYPE_CHECKING:
    from kdpipe.export.making import Made

FORMATS = ("onnx", "torch_export", "safetensors")


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.export",
        description="A finished run's network as files, preprocessing inside, checked against PyTorch and timed.",
    )
    parser.add_argument("run", metavar="RUN", help="id of a finished run, or runs:/<run id>/epoch_<number>")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["onnx"], help="default: onnx (float and int8)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder that gets the files")
    parser.add_argument("--root", metavar="FOLDER", help="where the run's images are now (default: where they were)")
    parser.add_argument(
        "--images", metavar="N", type=int, default=1000, help="test images for the checks (default: %(default)s)"
    )
    parser.add_argument(
        "--max-loss",
        metavar="POINTS",
        type=float,
        default=1.0,
        help="accuracy that int8 may lose (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=20, help="for which is timed (default: %(default)s)"
    )
    parser.add_argument("--license", metavar="TEXT", help="of the weights, for the model card")
    parser.add_argument("--register", metavar="NAME", help="put the ONNX model into MLflow's registry under this name")
    parser.add_argument("--alias", help="that the registered version gets (default: candidate)")
    parser.add_argument("--register-int8", action="store_true", help="register the int8 model instead of the float one")
    add_store_arguments(parser)
    return parser.parse_args(words)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for flags that cannot be."""
    if arguments.out.exists() or arguments.out.is_symlink():
        raise ValueError(f"--out {arguments.out}: this exists; the name of a new folder is accepted")
    for flag, value, accepted in (
        ("--images", arguments.images, arguments.images >= 1),
        ("--seconds", arguments.seconds, 0 <= arguments.seconds < float("inf")),
        ("--max-loss", arguments.max_loss, 0 <= arguments.max_loss <= 100),
    ):
        if not accepted:
            least = "a number from 1" if flag == "--images" else "a number from 0"
            raise ValueError(f"{flag} {value}: {least}{' to 100' if flag == '--max-loss' else ''} is accepted")
    if arguments.register is None:
        if arguments.register_int8 or arguments.alias is not None:
            flag = "--register-int8" if arguments.register_int8 else f"--alias {arguments.alias}"
            raise ValueError(f"{flag}: with --register NAME alone")
    elif "onnx" not in arguments.format:
        raise ValueError(
            f"--register {arguments.register}: what is registered is the ONNX model, so --format onnx is accepted, "
            f"not {' '.join(arguments.format)} alone"
        )


def run(arguments: argparse.Namespace) -> str:
    """Export, and what came of it as text.

    Raises:
        ValueError: flags that cannot be, no such run, no images; a file that is refused (the others are there).
    """
    check_arguments(arguments)
    uri = existing_store(arguments)

    # Seconds of imports, after what can fail sooner.
    from kdpipe.export.deployed import ONNX, check_extra

    if "onnx" in arguments.format:
        check_extra("--format onnx", "onnx", "onnxruntime", "onnxscript")
    from kdpipe.export.check import as_table
    from kdpipe.export.making import make, open_sources
    from kdpipe.tracking import RunStore
    from kdpipe.tracking.registry import check_registry, register

    alias = arguments.alias or "candidate"
    store = RunStore(uri)
    if arguments.register is not None:
        check_registry(store, arguments.register, alias)
    with new_folder(arguments.out) as folder:
        sources = open_sources(arguments.run, store, arguments.root)
        made = make(
            sources,
            folder,
            list(dict.fromkeys(arguments.format)),
            images=arguments.images,
            max_loss=arguments.max_loss,
            seconds=arguments.seconds,
            license=arguments.license,
        )
        if not made.files:
            raise ValueError(refusals(made))
        keep(folder, arguments.out)
    lines = [as_table(made.rows), *made.notes]
    lines += [f"written: {arguments.out / name}" for name in sorted(made.files)]
    print("\n".join(lines), flush=True)
    if arguments.register is not None:
        from kdpipe.export.deployed import INT8

        name = INT8 if arguments.register_int8 else ONNX
        if name not in made.files:
            raise ValueError(f"{refusals(made)}; so nothing is registered")
        version = register(
            store,
            sources.run.record.id,
            arguments.register,
            alias,
            arguments.out / name,
            made.tags(name),
            sources.example,
        )
        print(version.told(), flush=True)
    if made.refused:
        raise ValueError(refusals(made))
    return f"use: python -m kdpipe.predict {shlex.quote(str(arguments.out))} PHOTO.jpg"


def refusals(made: "Made") -> str:
    return "; ".join(f"{name} is refused: {problem}" for name, problem in made.refused.items())


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, gone at the end: an export that is interrupted leaves nothing."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; a folder that can be written is accepted") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def keep(folder: Path, out: Path) -> None:
    """Give a finished folder its name, and others the right to read it, as new folders have."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
    try:
        folder.rename(out)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; the name of a new folder is accepted") from error


def cli() -> None:
    """`python -m kdpipe.export`."""
    arguments = arguments_of()
    # So that what is unfinished is taken away, as after Control-C.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run_command("kdpipe.export", lambda: run(arguments))
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    cli()
