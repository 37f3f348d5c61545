"""Files of anything: random bytes, and real files cut off or with bytes changed, for each format that is read.

Each format has a process of its own, whose memory is limited: a file that wants more, crashes it or keeps it busy fails
the test, as does an error that is not for users.
"""

import multiprocessing
import os
import resource
import signal
import sys
import traceback
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image, features
from safetensors.torch import save_file

from kdpipe.data.decode import ImageFile, decoded_source, read_image
from kdpipe.data.dogs_vs_cats import dogs_vs_cats
from kdpipe.models.weights import read_weights
from kdpipe.runs.claim import worker_pid
from kdpipe.runs.journal import Journal, read_rows, write_rows
from kdpipe.settings.composition import CONF
from kdpipe.settings.hydra_errors import explain
from kdpipe.settings.yaml_files import check_foreign
from kdpipe.training.checkpoint import checkpoint_digest, load_checkpoint, save_checkpoint
from kdpipe.training.precomputed import is_intact

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of decoders
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's memory cannot be limited"),
]

MEMORY = 1_000_000_000  # bytes that a process may take beyond what it has at first
SECONDS = 10  # of computing, for one file; they take milliseconds
Read = Callable[[bytes], object]


class HangError(BaseException):
    """No `Exception`, which code that reads files may take for one of theirs."""


@st.composite
def damaged(draw: st.DrawFn, whole: Sequence[bytes]) -> bytes:
    """Random bytes, perhaps after a real beginning; or a real file that was cut or changed in a few places."""
    original = draw(st.sampled_from(whole))
    position = st.integers(0, len(original) - 1)
    kind = draw(st.sampled_from(["random", "random end", "cut", "changed", "changed in its head"]))
    if kind == "random":
        return draw(st.binary(max_size=500))
    if kind == "random end":
        return original[: draw(position)] + draw(st.binary(max_size=200))
    if kind == "cut":
        return original[: draw(position)]
    if kind == "changed in its head":
        position = st.integers(0, min(100, len(original) - 1))
    content = bytearray(original)
    for place, value in draw(st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=8)):
        content[place] = value
    return bytes(content)


def fuzz(read: Read, whole: Sequence[bytes], cases: int) -> None:
    """Raise AssertionError for a file that `read` neither takes nor refuses in one line for users."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, _hangs)

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(whole))
    def takes_or_refuses(content: bytes) -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # a shared machine may keep it waiting for longer
        try:
            read(content)
        except (ValueError, OSError) as error:
            said = explain(error)
            assert said and "\n" not in said and "HYDRA_FULL_ERROR" not in said, said
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    for content in whole:
        read(content)
    takes_or_refuses()


def _hangs(signum: int, frame: FrameType | None) -> None:
    raise HangError(f"more than {SECONDS} s")


def in_a_process(task: Callable[[], None], seconds: float) -> None:
    """Run `task` in a process of its own, and fail with its error, its crash or its silence."""

    def run(answer: Connection) -> None:
        try:
            task()
            answer.send("")
        except BaseException:
            answer.send(traceback.format_exc())

    context = multiprocessing.get_context("fork")  # which has PyTorch imported already
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(send,), daemon=True)
    process.start()
    send.close()
    try:
        assert receive.poll(seconds), f"no end after {seconds} s"
        told = receive.recv()
    except EOFError:
        process.join()
        told = f"the process crashed ({process.exitcode})"
    finally:
        process.kill()
    assert not told, told


def image_bytes(photo: Callable[..., Image.Image], format_name: str) -> list[bytes]:
    """A small photo in some of the ways that a format has."""
    ways: dict[str, list[tuple[str, dict[str, object]]]] = {
        "JPEG": [("RGB", {}), ("L", {"progressive": True}), ("CMYK", {})],
        "PNG": [("RGB", {}), ("P", {}), ("I;16", {}), ("RGBA", {"save_all": True, "append_images": 1})],
        "WEBP": [("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", {"save_all": True, "append_images": 1})],
        "GIF": [("P", {}), ("P", {"save_all": True, "append_images": 1})],
        "BMP": [("RGB", {}), ("P", {}), ("1", {})],
        "TIFF": [
            ("RGB", {}),
            ("I;16", {}),
            ("CMYK", {"compression": "tiff_lzw"}),
            ("RGB", {"compression": "jpeg"}),
            ("RGB", {"compression": "tiff_deflate"}),
            ("1", {"compression": "group4"}),
        ],
        "PPM": [("RGB", {}), ("L", {}), ("1", {}), ("F", {})],
        "JPEG2000": [("RGB", {})],
        "AVIF": [("RGB", {})],
        "MPO": [("RGB", {"save_all": True, "append_images": 1})],
    }
    contents = []
    for mode, options in ways[format_name]:
        image = photo(0, 0, (24, 16)).convert(mode.replace("I;16", "I")).convert(mode)
        if "append_images" in options:
            options = options | {"append_images": [photo(1, 0, (24, 16)).convert(mode)]}
        file = BytesIO()
        image.save(file, format_name, **options)
        contents.append(file.getvalue())
    return contents


def images(format_name: str, photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    return read_image, image_bytes(photo, format_name)


def archive(photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    """Kaggle's, by itself and in the archive of the competition."""
    contents = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        train = BytesIO()
        with zipfile.ZipFile(train, "w", compression) as packed:
            for kind, name in enumerate(("cat", "dog")):
                file = BytesIO()
                photo(kind, 0, (8, 8)).save(file, "JPEG", quality=20)
                packed.writestr(f"train/{name}.0.jpg", file.getvalue())
        whole = BytesIO()
        with zipfile.ZipFile(whole, "w", compression) as packed:
            packed.writestr("train.zip", train.getvalue())
        contents += [train.getvalue(), whole.getvalue()]

    def read(content: bytes) -> None:
        (folder / "train.zip").write_bytes(content)
        dogs_vs_cats(str(folder / "train.zip"), 4, "skip", str(folder / "cache"))

    return read, contents


def weights(suffix: str, photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    state = {"conv.weight": torch.randn(2, 3), "bn.num_batches_tracked": torch.tensor(3)}
    file = folder / f"weights{suffix}"
    contents = []
    if suffix == ".safetensors":
        save_file(state, file, metadata={"class_names": '["cat", "dog"]'})
        contents.append(file.read_bytes())
    else:
        for content in (state, {"state_dict": state, "epoch": 1}, torch.nn.Linear(2, 2).state_dict()):
            torch.save(content, file, _use_new_zipfile_serialization=suffix == ".pth")
            contents.append(file.read_bytes())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_weights("model.weights", file)

    return read, contents


def cached_images(part: str, photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    """What was decoded before; a damaged entry is made again."""
    (good,) = image_bytes(photo, "PPM")[:1]
    files = [ImageFile(name, label, (0,), lambda: good) for label, name in enumerate(("cat", "dog"))]
    load = partial(
        decoded_source, files, ("cat", "dog"), image_size=4, on_bad_image="stop", cache_dir=str(folder / "cache")
    )
    load()
    (entry,) = [path for path in (folder / "cache").iterdir() if path.is_dir()]

    def read(content: bytes) -> None:
        (entry / part).write_bytes(content)
        source = load()
        assert source.images.shape == (2, 3, 4, 4) and source.images.float().mean() >= 0
        assert source.labels.shape == (2,)

    return read, [(entry / part).read_bytes()]


def cached_answers(photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    np.save(folder / "outputs.npy", np.zeros((1, 3, 2), dtype=np.float32))
    (folder / "meta.json").write_text('{"about": "", "sha256": ""}')

    def read(content: bytes) -> None:
        (folder / "outputs.npy").write_bytes(content)
        is_intact(folder, (1, 3, 2))

    return read, [(folder / "outputs.npy").read_bytes()]


def checkpoints(photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    """What is left of one: it is known by its checksum; and what has the checksum of the damage is read, too."""
    save_checkpoint(folder / "checkpoints", {"training": {"weights": torch.randn(3)}, "history": [{"step": 1}]})
    (file,) = (folder / "checkpoints").iterdir()
    whole = file.read_bytes()

    def read(content: bytes) -> None:
        file.write_bytes(content)
        assert (load_checkpoint(folder / "checkpoints") is None) == (content != whole)
        again = file.with_name(f"000002-{checkpoint_digest(content)}.pt")
        again.write_bytes(content)
        try:
            load_checkpoint(folder / "checkpoints")
        finally:
            again.unlink()

    return read, [whole]


def lines(photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    rows = [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25}]
    write_rows(folder, rows)

    def read(content: bytes) -> None:
        (folder / "metrics.jsonl").write_bytes(content)
        assert all("step" in row for row in read_rows(folder))

    return read, [(folder / "metrics.jsonl").read_bytes()]


def journals(photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    Journal(folder, "sqlite:///mlflow.db", "0123", {"kdpipe.identity": "4567"}, files=["config.yaml"]).write()

    def read(content: bytes) -> None:
        (folder / "tracking.json").write_bytes(content)
        (folder / "owner.json").write_bytes(content)
        Journal.read(folder)
        worker_pid(folder)

    return read, [(folder / "tracking.json").read_bytes(), b'{"pid": 1, "host": "here"}']


def configs(photo: Callable[..., Image.Image], folder: Path) -> tuple[Read, list[bytes]]:
    file = folder / "theirs.yaml"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        check_foreign(file)

    # Not those with settings of Hydra's own, which a config from elsewhere may not have.
    theirs = (path for path in sorted(CONF.rglob("*.yaml")) if path.name != "config.yaml")
    return read, [path.read_bytes() for path in theirs if path.parents[1].name != "hydra"]


FORMATS = {
    **{name: partial(images, name) for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "MPO")},
    **{
        name: partial(images, name)
        for name, feature in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
        if features.check(feature)
    },
    "zip": archive,
    "safetensors": partial(weights, ".safetensors"),
    "torch.save": partial(weights, ".pth"),
    "torch.save of old": partial(weights, ".th"),
    "images.npy": partial(cached_images, "images.npy"),
    "labels.npy": partial(cached_images, "labels.npy"),
    "meta.json": partial(cached_images, "meta.json"),
    "outputs.npy": cached_answers,
    "checkpoint": checkpoints,
    "metrics.jsonl": lines,
    "tracking.json": journals,
    "YAML": configs,
}
CASES = [pytest.param(200, id="200"), pytest.param(5_000, id="5000", marks=pytest.mark.faults)]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", FORMATS)
def test_any_file_is_taken_or_refused_in_explain(name: str, cases: int, photo: Callable[..., Image.Image]) -> None:
    # In memory where it can be: each case that makes a cache entry anew waits for the disk.
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        read, whole = FORMATS[name](photo, Path(folder))
        in_a_process(lambda: fuzz(read, whole, cases), seconds=60 + cases * 0.5)


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda content: np.ones(2 * MEMORY, np.uint8), "MemoryError"),
        (lambda content: [None for _ in iter(int, 1)], "MemoryError"),
        (lambda content: os.kill(os.getpid(), signal.SIGSEGV), "crashed"),
        (lambda content: {}[content], "KeyError"),
        (lambda content: OmegaConf.create(content), "HYDRA_FULL_ERROR|ValidationError|Exception"),
    ],
    ids=["much memory", "ever more memory", "crash", "another error", "an error of a library"],
)
def test_what_must_not_happen_would_be_noticed(read: Read, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        in_a_process(lambda: fuzz(read, [b"a real file"], cases=5), seconds=60)


def test_a_hang_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)

    def read(content: bytes) -> None:
        while content != b"a real file":
            pass

    with pytest.raises(AssertionError, match="HangError"):
        in_a_process(lambda: fuzz(read, [b"a real file"], cases=5), seconds=60)
