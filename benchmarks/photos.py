"""`make bench-photos`: training from JPEG files, compared with torchvision's ImageFolder and a DataLoader.

Photos are made from those below --root, as large as cameras' small ones, in two class folders. Both sides resize the
shorter side, crop the centre and normalise; they take turns, with all images in each epoch, and medians over the rounds
count. The usual loop gains from what kdpipe sets for the whole process, such as the reuse of memory. kdpipe decodes
photos once: its first epoch includes that.

Then the memory of a user's Dataset while it is read: what belongs to the process alone (Linux's RssAnon), not the pages
of mapped files, which the system takes back when it needs them.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import tutorial
from bench import Bench, machine
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from kdpipe.data.feeding import feed
from kdpipe.data.torch_dataset import torch_source
from kdpipe.system.tables import markdown_table
from kdpipe.training.loop import batches

IMAGE_SIZE, CROP_PCT = 128, 0.875
SHORTER_SIDE = round(IMAGE_SIZE / CROP_PCT)
STORES = ("crop", "keep")  # of dataset.resize
USUAL = "ImageFolder, DataLoader with 2 workers"


def make_photos(root: Path, folder: Path, number: int, size: tuple[int, int]) -> list[Path]:
    """So many JPEG files of (width, height), in two class folders: those below `root`, and more of the same, each round
    cut a little closer."""
    originals = sorted(root.rglob("*.jpg"))
    if not originals:
        raise SystemExit(f"--root {root}: expected a folder with .jpg files")
    files = [folder / ("even", "odd")[count % 2] / f"{count:06}.jpg" for count in range(number)]
    for name in ("even", "odd"):
        (folder / name).mkdir(parents=True)

    def write(count: int, file: Path, original: Path) -> None:
        closer = 2 * (count // len(originals))
        with Image.open(original) as photo:
            box = (closer, closer, photo.width - closer, photo.height - closer)
            photo.convert("RGB").resize(size, Image.Resampling.BICUBIC, box).save(file, quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(number), files, cycle(originals)))
    return files


def usual_loader(folder: Path, mean: list[float], std: list[float]) -> DataLoader[Any]:
    steps = [transforms.Resize(SHORTER_SIDE), transforms.CenterCrop(IMAGE_SIZE), transforms.ToTensor()]
    data = ImageFolder(folder, transforms.Compose([*steps, transforms.Normalize(mean, std)]))
    return DataLoader(data, batch_size=tutorial.BATCH_SIZE, shuffle=True, num_workers=2)


def usual_epoch(loader: DataLoader[Any], network: nn.Module | None, device: torch.device) -> None:
    """An epoch of the loop that tutorials show; without a network, all but its step."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3) if network else None
    for pixels, labels in loader:
        pixels, labels = pixels.to(device), labels.to(device)
        if network and optimizer:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(pixels), labels).backward()
            optimizer.step()


def our_pixels(bench: Bench, model: Any, positions: Tensor) -> None:
    """An epoch of kdpipe's loop without the step: each batch, as the network takes it."""
    data = bench.data
    shuffled = positions[torch.randperm(len(positions))]
    with torch.no_grad():
        for _, images, _ in feed(
            batches(shuffled, tutorial.BATCH_SIZE), data.images, data.labels, bench.hardware.device
        ):
            model.preprocess(images)


def rates(arguments: argparse.Namespace, photos: Path, number: int) -> Iterator[tuple[str, str, float]]:
    """Of one round: what was measured, "pixels" or "steps", and the images a second."""
    for store in STORES:
        size = SHORTER_SIDE if store == "keep" else IMAGE_SIZE
        overrides = [f"dataset.resize={store}", f"dataset.image_size={size}", f"model.image_size={IMAGE_SIZE}"]
        overrides += ["model.resize=crop", f"model.crop_pct={CROP_PCT if store == 'keep' else 1}"]
        with tempfile.TemporaryDirectory(dir=photos.parent) as folder:
            started = time.perf_counter()
            bench = Bench(arguments, Path(folder), overrides)
            decoding = time.perf_counter() - started
            model = bench.model()
            positions = torch.arange(number, device=bench.data.labels.device)
            epochs: dict[str, Callable[[], object]] = {
                "pixels": partial(our_pixels, bench, model, positions),
                "steps": partial(bench.epoch(model, bench.data), positions),
            }
            for what, epoch in epochs.items():
                seconds = bench.seconds(epoch)
                yield f"kdpipe, {store}: first epoch", what, number / (decoding + seconds)
                yield f"kdpipe, {store}: later epochs", what, number / seconds
    loader = usual_loader(photos, model.mean.flatten().tolist(), model.std.flatten().tolist())
    network = bench.model().network.to(memory_format=torch.contiguous_format)
    for what, learner in (("pixels", None), ("steps", network)):
        seconds = bench.seconds(partial(usual_epoch, loader, learner, bench.hardware.device))
        yield USUAL, what, number / seconds


class Many(Dataset[Any]):
    """As many items as wanted, of a few files; it notes the process's own memory in MB on the way."""

    def __init__(self, files: list[Path], number: int) -> None:
        self.files, self.number, self.classes = files, number, ["even", "odd"]
        self.megabytes: dict[int, float] = {}

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index and index % (self.number // 10) == 0:
            status = Path("/proc/self/status").read_text()
            self.megabytes[index] = int(re.findall(r"RssAnon:\s*(\d+) kB", status)[0]) / 1024
        return Image.open(self.files[index % len(self.files)]), index % 2


def memory(files: list[Path], number: int, folder: Path) -> str:
    data = Many(files, number)
    source = torch_source({"train": data}, None, IMAGE_SIZE, "stop", str(folder), "crop")
    (early, first), *_, (late, last) = data.megabytes.items()
    stored, most = source.images.nbytes / 2**20, max(data.megabytes.values())
    return (
        f"a Dataset of {number:,} photos, {stored:,.0f} MB decoded: the process's own memory is {first:,.0f} MB after "
        f"{early:,} of them, {last:,.0f} MB after {late:,}, {most:,.0f} MB at most"
    )


def table(found: dict[tuple[str, str], list[float]]) -> str:
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        row = [name]
        for what in ("pixels", "steps"):
            usual, mine = found[USUAL, what], found[name, what]
            ratio = statistics.median(one / other for one, other in zip(mine, usual, strict=True))
            row += [f"{statistics.median(mine):,.0f}", f"{ratio:.2f}"]
        rows.append(row)
    return markdown_table(["images/s", "without the step", "ratio", "with it", "ratio"], rows, left=(0,))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make bench-photos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a folder with .jpg files, such as Dogs vs. Cats")
    parser.add_argument("--images", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--size", default="500x375", help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--memory-images", type=int, default=100_000, help="of the Dataset (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--model", default="student_cnn", help="the student (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="as train.device (default: %(default)s)")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    number = arguments.images
    with tempfile.TemporaryDirectory(prefix="kdpipe-bench-") as folder:
        photos = Path(folder) / "photos"
        files = make_photos(arguments.root, photos, number, (width, height))
        arguments.root, arguments.images = photos, None
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(arguments.rounds):
            for name, what, rate in rates(arguments, photos, number):
                found.setdefault((name, what), []).append(rate)
        hardware = Bench(arguments, Path(folder), ["dataset.image_size=8"]).hardware
        what = f"{number:,} photos of {width}×{height}, {arguments.model} at {IMAGE_SIZE}, {arguments.rounds} rounds"
        print(f"{machine(hardware)}; {what}\n{table(found)}", flush=True)
        if arguments.memory_images:
            print(memory(files, arguments.memory_images, Path(folder)))


if __name__ == "__main__":
    main()
