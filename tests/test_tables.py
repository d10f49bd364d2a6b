"""Tables: numbers are whole at any width, words are wrapped, and a pipe gets a line a row."""

from io import StringIO

import pytest
from rich.console import Console

from convneur.launch.tables import show_table

HEADINGS = ("split", "shards", "images", "GB", "kB an image", "images a class")
ROWS = [
    ("train of [bold]2012", "14,200", "14,200,000", "2,147.483", "12.1/110.3/15,700.0", "732/1,300/1,300"),
    ("val", "1", "50,000", "6.300", "1.0/2.0/3.0", "50/50/50"),
]


def shown(width: int, terminal: bool = True) -> str:
    console = Console(width=width, file=StringIO(), force_terminal=terminal, color_system=None)
    show_table(HEADINGS, ROWS, text=("split",), console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_numbers_are_never_cut(width: int) -> None:
    output = shown(width)
    for row in ROWS:
        for number in row[1:]:
            assert number in output.split()
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= max(width, len("  images a class  12.1/110.3/15,700.0"))


def test_words_are_wrapped_before_rows_become_paragraphs() -> None:
    *_, first, second, val = shown(86).splitlines()
    assert first.split()[:2] == ["train", "of"]
    assert second.strip() == "[bold]2012"
    assert val.split() == list(ROWS[1])


def test_a_pipe_gets_a_line_a_row() -> None:
    *_, train, val = shown(40, terminal=False).splitlines()
    assert train.split() == " ".join(ROWS[0]).split()
    assert val.split() == list(ROWS[1])
