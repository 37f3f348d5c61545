"""Tables whose lines do not break."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.system.tables import text_table

HEADINGS = ["", "loss", "test %", "MB", "95 %"]
ROWS = [
    ["resnet20", "CrossEntropy", "98.15 [96.97, 98.88]", "1.034", "5.22"],
    ["student_cnn", "KD alpha 0.5 temperature 5 ← best", "97.65 [95.75, 98.71]", "0.0441", "0.65 (0.80)"],
]
OPTIONAL = ("95 %", "MB")
SHORT = {"alpha ": "α ", "temperature ": "T "}


def table(width: int) -> str:
    return text_table(HEADINGS, ROWS, (0, 1), width=width, optional=OPTIONAL, short=SHORT)


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_a_table_that_fits_has_all() -> None:
    whole = table(200)
    assert "temperature 5" in whole and "0.0441" in whole and "left out" not in whole
    assert table(widest(whole)) == whole


@pytest.mark.parametrize(
    ("width", "has", "lacks"),
    [
        (85, ["MB", "temperature 5"], ["95 %"]),  # fewer columns
        (76, ["98.15 [96.97, 98.88]", "temperature 5", "left out for lack of width: 95 %, MB"], ["1.034"]),
        (60, ["98.15 [96.97, 98.88]", "KD α 0.5 T 5 ← best"], ["temperature"]),  # shorter words
        (56, ["98.2 [97.0, 98.9]"], ["98.15"]),  # fewer digits
        (50, ["98.2 [97.0, 98.9]", "…", "← best"], ["KD α 0.5"]),  # texts that are cut
    ],
)
def test_a_narrow_table_has_fewer_columns_then_fewer_digits(width: int, has: list[str], lacks: list[str]) -> None:
    text = table(width)
    assert widest(text) <= width
    assert [part for part in has if part not in text] == []
    assert [part for part in lacks if part in text.splitlines()[0] + text.splitlines()[3]] == []


TEXTS = st.text("abc .0123456789", max_size=60)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.integers(30, 130))
def test_no_line_of_texts_is_too_long(rows: list[tuple[str, str]], width: int) -> None:
    assert widest(text_table(["image", "answer"], rows, (0, 1), width=width)) <= width


def test_the_terminal_decides_and_a_pipe_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    long = [["a" * 300, "1"]]
    assert "…" not in text_table(["", ""], long)
    monkeypatch.setenv("COLUMNS", "80")
    assert widest(text_table(["", ""], long)) <= 80
