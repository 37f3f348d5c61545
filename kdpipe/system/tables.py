"""Tables as text: for a terminal, and as Markdown."""

import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence

from rich.box import MARKDOWN, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table

UNLIMITED = 10_000
LEAST = 8  # characters that are left of a text


def terminal_width() -> int:
    """The columns of the terminal, or of COLUMNS in the environment; in a file or a pipe UNLIMITED."""
    return shutil.get_terminal_size((UNLIMITED, 24)).columns


def text_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    *,
    width: int | None = None,
    optional: Sequence[str] = (),
    short: Mapping[str, str] | None = None,
) -> str:
    """A table for a terminal, without a heading if all `headings` are empty. Columns are aligned to the right, except
    those in `left`. Its lines do not break: a table that is too wide first loses columns, then has shorter words, then
    fewer digits, and at last texts that are cut.

    Args:
        width: of a line (default: `terminal_width`).
        optional: headings of columns that may be left out, the first one first; a last line names those that are.
        short: shorter words in the columns to the left.
    """
    limit = terminal_width() if width is None else width
    numbers, dropped = list(range(len(headings))), []
    shown = [list(row) for row in rows]

    def rendered() -> str:
        kept = [[row[number] for number in numbers] for row in shown]
        aligned = [place for place, number in enumerate(numbers) if number in left]
        return _render([headings[number] for number in numbers], kept, aligned, SIMPLE_HEAD)

    def excess() -> int:
        return max(map(len, rendered().split("\n"))) - limit

    for heading in optional:
        if excess() <= 0:
            break
        if heading in headings:
            dropped.append(heading)
            numbers = [number for number in numbers if headings[number] != heading]
    if excess() > 0:
        shown = [
            [_abbreviated(text, short or {}) if n in left else text for n, text in enumerate(row)] for row in shown
        ]
    if excess() > 0:
        shown = [[text if n in left else _fewer_digits(text) for n, text in enumerate(row)] for row in shown]
    while (over := excess()) > 0:
        longest = {n: max((len(row[n]) for row in shown), default=0) for n in numbers if n in left}
        widest = max(longest, key=lambda number: longest[number], default=None)
        if widest is None or longest[widest] <= LEAST:
            break
        most = max(longest[widest] - over, longest[widest] // 2, LEAST)  # several columns are cut alike
        for row in shown:
            row[widest] = _cut(row[widest], most)
    if not dropped:
        return rendered()
    note = f"left out for lack of width: {', '.join(dropped)}"
    return "\n".join([rendered(), textwrap.fill(note, limit, initial_indent="  ", subsequent_indent="  ")])


def _abbreviated(text: str, short: Mapping[str, str]) -> str:
    for word, abbreviation in short.items():
        text = text.replace(word, abbreviation)
    return text


def _fewer_digits(text: str) -> str:
    """98.15 [96.97, 98.88] as 98.2 [97.0, 98.9], 0.0441 as 0.044; what is in parentheses is left out."""

    def rounded(found: re.Match[str]) -> str:
        return f"{float(found[0]):.1f}" if float(found[0]) >= 1 else f"{float(found[0]):.2g}"

    return re.sub(r"\d+\.\d{2,}(?![\de])", rounded, re.sub(r" \([^)]*\)", "", text))


def _cut(text: str, most: int) -> str:
    """A text of at most so many characters: its beginning and its end, which often differ most."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same as Markdown."""
    escaped = [[text.replace("|", r"\|") for text in row] for row in rows]
    heading, _, *lines = _render(headings, escaped, left, MARKDOWN).split("\n")
    rule = "|".join("---" if number in left else "---:" for number in range(len(headings)))
    return "\n".join([heading, f"|{rule}|", *lines])


def _render(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int], box: Box) -> str:
    table = Table(box=box, show_header=any(headings))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Names may hold [brackets] and :cat:, which are text here.
    console = Console(width=UNLIMITED, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().split("\n") if line.strip())
