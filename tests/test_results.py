"""docs/results: what the page says is in the files of runs beside it."""

import re
from contextlib import chdir

import pytest
import results

PAGE = results.PAGE.read_text()
TABLES = [(found["words"], found["text"]) for found in results.TABLE.finditer(PAGE)]


@pytest.mark.parametrize(("words", "text"), TABLES, ids=[words for words, _ in TABLES])
def test_a_table_is_what_the_comparison_prints(words: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "")
    with chdir(results.PAGE.parent):
        assert results.table(words) == text


def test_the_sentences_have_only_numbers_of_the_tables() -> None:
    known = {number for _, text in TABLES for number in re.findall(r"\d+\.\d+", text)}
    assert known
    known |= {f"{float(number):.1f}" for number in known}
    sentences = re.sub(r"^( {4}.*|\|.*)$", "", results.TABLE.sub("", PAGE), flags=re.MULTILINE)  # without commands
    gains = re.findall(r"[+−]?\d+\.\d+(?= points?| %| to|\])", sentences)
    assert gains
    assert [number for number in gains if number.lstrip("+−") not in known] == []


def test_pictures_and_files_of_the_page_are_there() -> None:
    files = {found["file"] for found in results.PICTURE.finditer(PAGE)}
    files |= set(re.findall(r"--runs (\S+)", PAGE))
    assert files
    assert [file for file in files if not (results.PAGE.parent / file).is_file()] == []
