"""docs/results/README.md: its tables and pictures, made from the files of runs beside it.

    python benchmarks/results.py    # or make results

On the page, `<!-- table: ARGUMENTS -->` stands before a block with what `python -m kdpipe.compare ARGUMENTS` prints,
and `<!-- picture NAME: ARGUMENTS -->` before a link to the picture NAME that it draws. This writes both anew.
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

from kdpipe.compare.__main__ import run_comparison

PAGE = Path(__file__).parents[1] / "docs" / "results" / "README.md"
TABLE = re.compile(r"(?P<mark><!-- table: (?P<words>[^\n]+) -->\n)```text\n(?P<text>.*?)```", re.DOTALL)
PICTURE = re.compile(r"<!-- picture (?P<name>\S+): (?P<words>[^\n]+) -->\n!\[[^\]]*\]\((?P<file>[^)]+)\)")
WIDTH = 150  # of a table, in characters


def table(words: str) -> str:
    """What the comparison prints."""
    os.environ["COLUMNS"] = str(WIDTH)
    return f"{run_comparison(shlex.split(words))}\n"


def with_tables(page: str) -> str:
    """The page with all tables as they are printed now."""
    return TABLE.sub(lambda found: f"{found['mark']}```text\n{table(found['words'])}```", page)


def draw_pictures(page: str) -> list[Path]:
    """Draw the pictures of the page."""
    written = []
    for found in PICTURE.finditer(page):
        with tempfile.TemporaryDirectory() as folder:
            run_comparison([*shlex.split(found["words"]), "--out", folder])
            written.append(Path(shutil.copy(Path(folder, found["name"]), found["file"])))
    return written


def main() -> None:
    with chdir(PAGE.parent):
        page = PAGE.read_text()
        PAGE.write_text(with_tables(page))
        for file in (PAGE, *draw_pictures(page)):
            sys.stdout.write(f"written: {PAGE.parent.name}/{file.name}\n")


if __name__ == "__main__":
    main()
