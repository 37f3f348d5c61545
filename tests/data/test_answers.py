"""A teacher's answers from a file: whatever the container and the order, or one line that says what is wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import some_digits
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.data import ImageDataset, PerImageValues
from kdpipe.data.answers import digest_of_file, read_answers
from kdpipe.settings.errors import ConfigError

DIGITS = some_digits()
PHOTOS = replace(DIGITS, class_names=tuple("abcdefghij"), names=[f"train/{n}.jpg" for n in range(len(DIGITS.labels))])
COUNT = len(DIGITS.labels)
LOGITS = torch.randn(COUNT, 10, generator=torch.Generator().manual_seed(0)).numpy()
PROBABILITIES = torch.from_numpy(LOGITS).double().softmax(dim=1).numpy()
EVERYTHING = torch.arange(COUNT)


def table(values: np.ndarray = LOGITS, data: ImageDataset = PHOTOS) -> pd.DataFrame:
    images = {"image": data.names} if data.names else {"index": np.arange(COUNT)}
    return pd.DataFrame({**images, **dict(zip(data.class_names, values.T, strict=True))})


def write(file: Path, content: Any) -> str:
    if file.suffix == ".npz":
        np.savez(file, **content)
    elif file.suffix == ".csv":
        content.to_csv(file, index=False)
    else:
        content.to_parquet(file)
    return str(file)


def read(file: str, data: ImageDataset = PHOTOS, values: str = "auto", floor: float = 1e-8) -> PerImageValues:
    return read_answers(data, file, values, floor)


SHUFFLED = np.random.default_rng(0).permutation(COUNT)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("columns in any order.parquet", table()[["j", "image", *"bacdefghi"]]),
        ("rows in any order.csv", table().iloc[SHUFFLED]),
        ("names in the index.parquet", table().set_index("image")),
        ("names in an index without a name.parquet", table().set_index("image").rename_axis(None)),
        ("called file.csv", table().rename(columns={"image": "file"})),
        ("by position.csv", table().assign(image=range(COUNT)).rename(columns={"image": "index"})),
        ("positions called image.csv", table().assign(image=range(COUNT))),
        ("numbered classes.csv", table().rename(columns={name: f"logit_{n}" for n, name in enumerate("abcdefghij")})),
        ("pandas' own numbers.parquet", table().convert_dtypes()),
        ("in order.npz", {"logits": LOGITS}),
        ("by position.npz", {"logits": LOGITS[SHUFFLED], "index": SHUFFLED}),
        ("by name.npz", {"logits": LOGITS[SHUFFLED], "names": np.array(PHOTOS.names)[SHUFFLED]}),
        ("classes in another order.npz", {"logits": LOGITS[:, ::-1], "class_names": np.array([*"jihgfedcba"])}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_container_gives_the_same_logits_to_the_last_bit(tmp_path: Path, name: str, content: Any) -> None:
    answers = read(write(tmp_path / name, content))
    assert torch.equal(answers[EVERYTHING], torch.from_numpy(LOGITS))
    assert torch.equal(answers.positions, EVERYTHING)


@pytest.mark.parametrize("name", ["of.npz", "of.csv"])
def test_probabilities_become_logits_with_a_floor(tmp_path: Path, name: str) -> None:
    sure = np.where(np.arange(10) == DIGITS.labels[:, None].numpy(), 1.0, 0.0)
    mixed = np.where(np.arange(COUNT)[:, None] % 2, PROBABILITIES, sure)
    file = write(tmp_path / name, {"probabilities": mixed} if name == "of.npz" else table(mixed))
    expected = np.log(np.maximum(mixed, 1e-4))
    assert np.allclose(read(file, floor=1e-4)[EVERYTHING].numpy(), expected, rtol=1e-6)
    assert float(read(file).values.min()) == pytest.approx(np.log(1e-8), rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float16, np.float32, np.float64]))
def test_softmax_of_the_logits_is_the_given_probability(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: type[np.floating]
) -> None:
    given_ones = np.random.default_rng(seed).dirichlet(np.ones(10), COUNT).astype(dtype)
    file = write(tmp_path_factory.mktemp("answers") / "p.npz", {"probabilities": given_ones})
    again = read(file).values.double().softmax(dim=1).numpy()
    assert np.allclose(again, given_ones / given_ones.sum(axis=1, keepdims=True, dtype=np.float64), atol=1e-6)


def test_numbers_between_0_and_1_may_be_logits(tmp_path: Path) -> None:
    similarities = PROBABILITIES / 2 + 0.2
    file = write(tmp_path / "clip.csv", table(similarities))
    with pytest.raises(ConfigError, match=rf"do not sum to 1 for {COUNT:,} images .*teacher.values=logits takes"):
        read(file)
    assert np.array_equal(read(file, values="logits")[EVERYTHING].numpy(), similarities.astype(np.float32))


def test_answers_for_some_images_are_enough_if_these_are_the_training_images(tmp_path: Path) -> None:
    train = DIGITS.splits["train"]
    answers = read(write(tmp_path / "train.parquet", table().iloc[train.numpy()]))
    assert torch.equal(answers.positions, train.sort().values)
    assert torch.equal(answers[train], torch.from_numpy(LOGITS)[train])


def changed(change: Callable[[pd.DataFrame], Any], values: np.ndarray = LOGITS) -> pd.DataFrame:
    frame = table(values)
    made = change(frame)
    return frame if made is None else made


def cell(row: int, value: float) -> Callable[[pd.DataFrame], None]:
    return lambda frame: frame.__setitem__("c", frame["c"].where(frame.index != row, value))


FIRST, SECOND = DIGITS.splits["train"][:2].tolist()
WRONG: dict[str, tuple[pd.DataFrame, str]] = {
    "missing": (
        changed(lambda frame: frame.drop([FIRST, SECOND])),
        f"no answer for 2 of 234 training images (train/{FIRST}.jpg, train/{SECOND}.jpg)",
    ),
    "unknown": (
        changed(lambda frame: frame.replace("train/3.jpg", "cat.jpg")),
        f"1 image not among train/0.jpg to train/{COUNT - 1}.jpg of digits (cat.jpg)",
    ),
    "twice": (
        changed(lambda frame: pd.concat([frame, frame.iloc[5:7]])),
        "more than one row for 2 images (train/5.jpg, train/6.jpg)",
    ),
    "a class less": (
        changed(lambda frame: frame.drop(columns="c")),
        "among its columns no column for c; the 10 classes of digits are a, b, c and 7 more",
    ),
    "an unknown class": (
        changed(lambda frame: frame.rename(columns={"c": "cat"})),
        "among its columns cat is no class, no column for c; the 10 classes of digits are a, b, c and 7 more",
    ),
    "too few numbered": (
        changed(lambda frame: frame[["image", "a", "b"]].rename(columns={"a": "0", "b": "1"})),
        "it has 2 classes; digits has 10 (a, b, c and 7 more)",
    ),
    "text": (changed(lambda frame: frame.assign(c="high")), "its column c has other values than numbers"),
    "NaN": (changed(cell(7, np.nan)), "NaN or infinite values for 1 image (train/7.jpg)"),
    "infinite": (changed(cell(7, -np.inf)), "NaN or infinite values for 1 image (train/7.jpg)"),
    "too large for float32": (changed(cell(7, 1e300)), "NaN or infinite values for 1 image (train/7.jpg)"),
    "a sum": (
        changed(cell(7, 0.99), PROBABILITIES),
        "probabilities that do not sum to 1 for 1 image (train/7.jpg: 1.",
    ),
    "per cent": (changed(lambda frame: None, 100 * PROBABILITIES), "its rows sum to 100; expected probabilities"),
    "no image": (
        changed(lambda frame: frame.assign(image=frame["image"].where(frame.index > 2))),
        "3 of its 1,797",
    ),
    "no rows": (changed(lambda frame: frame[:0]), "it has no rows"),
    "no column for the image": (
        changed(lambda frame: frame.drop(columns="image")),
        "expected one column image, name, file or index, for what the row is about; it has none of them, but a, b, c",
    ),
    "two columns for the image": (changed(lambda frame: frame.assign(index=range(COUNT))), "it has image and index"),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_table_is_said_in_a_line(tmp_path: Path, case: str, ending: str) -> None:
    content, said = WRONG[case]
    file = write(tmp_path / f"answers.{ending}", content)
    with pytest.raises(ConfigError) as error:
        read(file)
    assert str(error.value).startswith(f"file={file}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_with_rows_is_said_at_once(tmp_path: Path) -> None:
    frame = table().drop([FIRST])
    frame.loc[SECOND, "c"] = np.nan
    with pytest.raises(ConfigError, match=r"no answer for 1 of 234 training images .*; NaN or infinite values for 1"):
        read(write(tmp_path / "answers.csv", frame))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"scores": LOGITS}, "it has the arrays scores; expected logits or probabilities"),
        ({"logits": LOGITS, "probabilities": PROBABILITIES}, "the arrays logits, probabilities; expected logits or"),
        ({"logits": LOGITS[0]}, "its logits are float32 [10]; expected numbers [N, classes]"),
        ({"logits": LOGITS[:, :9]}, "it has 9 classes; digits has 10"),
        ({"logits": LOGITS, "class_names": np.array(["a", "b"])}, "it has 2 class_names for 10 columns of logits"),
        ({"logits": LOGITS, "names": np.array(["a", "b"])}, "its images are [2], its logits [1797, 10]"),
        ({"logits": LOGITS, "names": np.array(PHOTOS.names, dtype=object)}, "not a readable .npz file of numbers and"),
        ({"logits": LOGITS[:9]}, "no answer for 234 of 234 training images"),
        ({"probabilities": np.full((COUNT, 10), 0.2)}, "do not sum to 1 for 1,797 images (0: 2;"),
        ({"probabilities": LOGITS}, "probabilities below 0 for "),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_arrays_is_said_in_a_line(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(write(tmp_path / "answers.npz", content))
    assert said in str(error.value)


@pytest.mark.parametrize("ending", ["npz", "parquet", "csv"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"answers.{ending}"
    file.write_bytes(b"\x00\xff PK")
    with pytest.raises(ConfigError, match=rf"not a readable \.{ending} file"):
        read(str(file))


def test_images_without_names_go_by_position(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the images of digits have no names; expected their positions, 0 to 1796"):
        read(
            write(tmp_path / "answers.csv", table().rename(columns=dict(zip("abcdefghij", "0123456789", strict=True)))),
            DIGITS,
        )


def test_a_name_of_several_images_stands_for_none(tmp_path: Path) -> None:
    several = replace(PHOTOS, names=["train/0.jpg", *PHOTOS.names[:-1]])
    with pytest.raises(ConfigError, match=r"more than one image of digits is called train/0.jpg; expected positions"):
        read(write(tmp_path / "answers.csv", table()), several)


def test_a_file_goes_by_its_content(tmp_path: Path) -> None:
    one, copy, other = (tmp_path / name for name in ("one.npz", "copy.npz", "other.npz"))
    np.savez(one, logits=LOGITS)
    copy.write_bytes(one.read_bytes())
    np.savez(other, logits=LOGITS + 1)
    assert digest_of_file(str(one)) == digest_of_file(str(copy)) != digest_of_file(str(other))
    before = digest_of_file(str(copy))
    copy.write_bytes(other.read_bytes())
    assert digest_of_file(str(copy)) == digest_of_file(str(other)) != before


@pytest.mark.parametrize(("name", "said"), [("no.csv", "file not found"), ("answers.txt", "a .npz, .parquet or .csv")])
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        digest_of_file(str(tmp_path / name))
