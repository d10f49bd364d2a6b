"""Tables on a terminal of any width, or for a program: headings and words are wrapped, numbers are never cut.

For a file or a pipe a table is as wide as it is. On a terminal that is narrower than its numbers are, each row becomes
a paragraph, a line a cell.
"""

from collections.abc import Collection, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from convneur.launch.parser import printable

ENDLESS = 1 << 16  # characters of a line in a file
GAP = 2  # characters between two columns
LEAST_TEXT = 16  # characters that a column of words is left, if its words are as many


def show_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Collection[str] = (),
    styles: Sequence[str | None] = (),
    sections: Collection[int] = (),
    console: Console | None = None,
) -> None:
    """Prints a table; see `table_of`."""
    console = console or Console()
    width = console.width if console.is_terminal else None
    if width is None:
        console.width = ENDLESS
    console.print(table_of(headings, rows, width, text=text, styles=styles, sections=sections), soft_wrap=True)


def table_of(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    *,
    text: Collection[str] = (),
    styles: Sequence[str | None] = (),
    sections: Collection[int] = (),
) -> RenderableType:
    """A table that fits into `width` characters, if anything does; None for no limit.

    Args:
        headings: of the columns.
        rows: their cells.
        width: of the terminal.
        text: headings of the columns that hold words, to be wrapped and aligned on the left; the others hold numbers.
        styles: of the rows, as rich names them.
        sections: rows that a rule follows.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = _widths(headings, rows, width, text)
    if widths is None:
        return Text("\n".join(_paragraphs(headings, rows)))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for heading, wide in zip(headings, widths, strict=True):
        table.add_column(Text(heading), justify="left" if heading in text else "right", width=wide, overflow="fold")
    for number, row in enumerate(rows):
        style = styles[number] if styles else None
        table.add_row(*map(Text, row), style=style, end_section=number in sections)
    return table


def _widths(
    headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, text: Collection[str]
) -> list[int] | None:
    """Of the columns; None where they don't fit."""
    longest = [max([1, *(cell_len(row[column]) for row in rows)]) for column in range(len(headings))]
    natural = [max(cell_len(heading), cell) for heading, cell in zip(headings, longest, strict=True)]
    room = (width or sum(natural) + GAP * len(natural)) - GAP * (len(natural) - 1)
    if sum(natural) <= room:
        return natural
    least = []
    for heading, cell in zip(headings, longest, strict=True):
        words = max(map(len, heading.split()))
        least.append(max(words, min(cell, LEAST_TEXT) if heading in text else cell))
    spare = room - sum(least)
    if spare < 0:
        return None
    wanting = [column for column in range(len(least)) if headings[column] in text]
    wanting.sort(key=lambda column: natural[column] - least[column])
    for left, column in zip(range(len(wanting), 0, -1), wanting, strict=True):  # alike, but none more than it needs
        more = min(spare // left, natural[column] - least[column])
        least[column] += more
        spare -= more
    return least


def _paragraphs(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    wide = max(map(len, headings[1:]), default=0)
    for row in rows:
        yield row[0]
        yield from (
            f"  {heading:<{wide}}  {cell}".rstrip() for heading, cell in zip(headings[1:], row[1:], strict=True)
        )
