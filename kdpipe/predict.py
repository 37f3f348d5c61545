"""The command `python -m kdpipe.predict`: what a network sees in images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.runs.command_line import add_store_arguments, existing_store, printable, run_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kdpipe.export.deployed import Deployed

TOGETHER = 256  # images that are in memory at once
NAME = "kdpipe.predict"


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kdpipe.predict",
        description="The answer of a network to each image, and how probable it holds it.",
    )
    parser.add_argument(
        "network", metavar="FILE_OR_RUN", help="what kdpipe.export wrote (the folder or a file in it), or a run's id"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--teacher", metavar="FILE_OR_RUN", help="the answers of another network beside them")
    parser.add_argument(
        "--top", metavar="K", type=int, default=1, help="the K likeliest answers (default: %(default)s)"
    )
    parser.add_argument("--trust", action="store_true", help="load .pt2 files, which can run code that is in them")
    add_store_arguments(parser)
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> str:
    """The answers as a table.

    Raises:
        ValueError: no such network, or images that are none; the others are answered first.
    """
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top}: a number from 1 is accepted")

    # Seconds of imports, after what can fail sooner.
    from kdpipe.export.deployed import open_deployed
    from kdpipe.tracking import RunStore

    def store() -> RunStore:
        return RunStore(existing_store(arguments))

    networks = [
        open_deployed(address, store, arguments.trust)
        for address in (arguments.network, arguments.teacher)
        if address is not None
    ]
    if len({network.class_names for network in networks}) > 1:
        known = ", ".join(networks[1].class_names[:10])
        print(printable(f"{NAME}: --teacher {arguments.teacher} knows other classes: {known}"), file=sys.stderr)
    rows: list[list[str]] = []
    bad: dict[str, str] = {}
    for first in range(0, len(arguments.images), TOGETHER):
        rows += answers(networks, arguments.images[first : first + TOGETHER], arguments.top, bad)
    for name, reason in bad.items():
        print(printable(f"{NAME}: {name}: {reason}"), file=sys.stderr)
    if bad:
        if rows:
            print(as_table(rows), flush=True)
        raise ValueError(f"{len(bad)} of {len(arguments.images)} images could not be read")
    return as_table(rows)


def answers(networks: Sequence["Deployed"], names: Sequence[str], top: int, bad: dict[str, str]) -> list[list[str]]:
    """The lines of the table for some images: name, answer, probability, and likewise the teacher's.

    Args:
        bad: gets those that cannot be read, and why.
    """
    import numpy as np

    views: list[list[NDArray[np.uint8]]] = []
    good = []
    for name in names:
        try:
            views.append(seen(Path(name), [network.image_shape for network in networks]))
            good.append(name)
        except (ValueError, OSError) as error:
            bad[name] = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if not good:
        return []
    of_each = [np.stack(images) for images in zip(*views, strict=True)]  # of the networks
    probabilities = [network.probabilities(images) for network, images in zip(networks, of_each, strict=True)]
    rows = []
    for number, name in enumerate(good):
        ranked = [np.argsort(-each[number], kind="stable")[:top] for each in probabilities]
        for place in range(max(map(len, ranked))):
            line = [name if place == 0 else ""]
            for network, each, order in zip(networks, probabilities, ranked, strict=True):
                if place < len(order):
                    answer = order[place]
                    line += [network.class_names[answer], f"{100 * each[number, answer]:.1f} %"]
                else:
                    line += ["", ""]
            rows.append(line)
    return rows


def seen(file: Path, shapes: Sequence[tuple[int, int, int]]) -> "list[NDArray[np.uint8]]":
    """An image file as each network takes it, uint8 (C, H, W), made as the images of its data set were.

    Raises:
        ValueError: it is no image.
        OSError: it cannot be read.
    """
    import numpy as np
    from PIL import Image

    from kdpipe.data.decode import check_bytes, read_image

    check_bytes(file.stat().st_size)
    photo = read_image(file.read_bytes())
    views = []
    for channels, height, width in shapes:
        view = photo.convert("L") if channels == 1 else photo
        if view.size != (width, height):
            view = view.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(view)
        views.append(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))
    return views


def as_table(rows: Sequence[Sequence[str]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from kdpipe.evaluation.report import render

    table = Table(box=SIMPLE_HEAD)
    for heading in ("image", "answer", "probability", "teacher's", "probability")[: len(rows[0])]:
        table.add_column(heading, justify="right" if heading == "probability" else "left")
    for row in rows:
        table.add_row(*map(printable, row))
    return render(table)


def cli() -> None:
    """`python -m kdpipe.predict`."""
    arguments = arguments_of()
    run_command(NAME, lambda: run(arguments))


if __name__ == "__main__":
    cli()
