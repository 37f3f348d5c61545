"""The command `python -m kdpipe.predict`: classify image files with an exported network or a run."""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.runs.command_line import (
    add_store_arguments,
    add_wide_argument,
    check_flags,
    existing_store,
    printable,
    run_command,
    table_width,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kdpipe.export.predictor import Predictor
    from kdpipe.settings.values import Resize

CHUNK = 256  # images in memory at once
NAME = "kdpipe.predict"


def predict_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kdpipe.predict", description="Classify image files.")
    network = "output of kdpipe.export (the folder or a file in it), or a run's id"
    parser.add_argument("network", metavar="FILE_OR_RUN", help=network)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--teacher", metavar="FILE_OR_RUN", help="another network, whose predictions are shown as well")
    parser.add_argument("--top", metavar="K", type=int, default=1, help="show the K likeliest classes (default: 1)")
    parser.add_argument("--trust", action="store_true", help="load .pt2 files, which can run code hidden in them")
    add_wide_argument(parser)
    add_store_arguments(parser)
    return parser.parse_args(words)


def predict_images(arguments: argparse.Namespace) -> str:
    """The predictions as a table.

    Raises:
        ValueError: there is no such network, or some files are not images (printed after the table of the others).
    """
    from kdpipe.settings.values import PositiveInt, composed

    check_flags(arguments, top=PositiveInt)

    # These imports take seconds, so they come after the quick checks.
    from kdpipe.export.predictor import open_predictor
    from kdpipe.tracking import RunStore

    networks = [
        open_predictor(address, lambda: RunStore(existing_store(arguments)), arguments.trust)
        for address in filter(None, (arguments.network, arguments.teacher))
    ]
    if len({composed(network.class_names) for network in networks}) > 1:
        classes = ", ".join(networks[1].class_names[:10])
        print(printable(f"{NAME}: --teacher {arguments.teacher} has other classes: {classes}"), file=sys.stderr)
    rows: list[list[str]] = []
    unreadable: dict[str, str] = {}
    for first in range(0, len(arguments.images), CHUNK):
        rows += _prediction_rows(networks, arguments.images[first : first + CHUNK], arguments.top, unreadable)
    for name, reason in unreadable.items():
        print(printable(f"{NAME}: {name}: {reason}"), file=sys.stderr)
    table = prediction_table(rows, table_width(arguments)) if rows else ""
    if not unreadable:
        return table
    print(table, end="\n" if table else "", flush=True)
    raise ValueError(f"{len(unreadable)} of {len(arguments.images)} images could not be read")


def _prediction_rows(
    networks: Sequence["Predictor"], names: Sequence[str], top: int, unreadable: dict[str, str]
) -> list[list[str]]:
    """Rows for some images: name, and class and probability of each network; files that fail go to `unreadable`."""
    import numpy as np

    images: list[list[NDArray[np.uint8]]] = []
    readable = []
    for name in names:
        try:
            images.append(load_image(Path(name), [(network.image_shape, network.resize) for network in networks]))
            readable.append(name)
        except (ValueError, OSError) as error:
            unreadable[name] = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if not readable:
        return []
    batches = [np.stack(batch) for batch in zip(*images, strict=True)]  # one for each network
    probabilities = [network.probabilities(batch) for network, batch in zip(networks, batches, strict=True)]
    rows = []
    for number, name in enumerate(readable):
        answers = [
            [(network.class_names[label], f"{100 * each[number, label]:.1f} %") for label in order[:top]]
            for network, each in zip(networks, probabilities, strict=True)
            for order in [np.argsort(-each[number], kind="stable")]
        ]
        for rank, parts in enumerate(zip_longest(*answers, fillvalue=("", ""))):  # one may have fewer classes
            rows.append([name if rank == 0 else "", *chain.from_iterable(parts)])
    return rows


def load_image(file: Path, forms: "Sequence[tuple[tuple[int, int, int], Resize]]") -> "list[NDArray[np.uint8]]":
    """An image file as uint8 arrays of these shapes (C, H, W), resized as said, prepared as the images of a data set
    are.

    Raises:
        ValueError: it is not an image.
        OSError: it cannot be read.
    """
    import numpy as np

    from kdpipe.data.decode import fitted, read_file, read_image

    photo = read_image(read_file(file))
    views = []
    for (channels, height, width), resize in forms:
        view = photo.convert("L") if channels == 1 else photo
        pixels = np.asarray(fitted(view, (width, height), resize))
        views.append(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))
    return views


def prediction_table(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    from kdpipe.system.tables import text_table

    headings = ("image", "answer", "probability", "teacher's", "probability")[: len(rows[0])]
    return text_table(headings, [[printable(text) for text in row] for row in rows], left=(0, 1, 3), width=width)


def cli() -> None:
    """`python -m kdpipe.predict`."""
    run_command(NAME, lambda: predict_images(predict_arguments()))


if __name__ == "__main__":
    cli()
