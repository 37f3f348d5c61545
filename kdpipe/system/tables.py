"""Tables as text: for a terminal, and as Markdown."""

from collections.abc import Collection, Sequence

from rich.box import MARKDOWN, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table for a terminal, wider than the terminal rather than cut; without a heading if all `headings` are empty.
    Columns are aligned to the right, except those in `left`."""
    return _render(headings, rows, left, SIMPLE_HEAD)


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
    console = Console(width=10_000, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().split("\n") if line.strip())
