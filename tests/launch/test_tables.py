"""Tables: numbers are whole at any width, words are wrapped, and a pipe gets a line a row."""

import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from convneur.launch.cli import main
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


def test_a_damaged_split_hides_no_other(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    (index,) = (path for path in copy.iterdir() if "val" in path.name and "index" in path.name)
    index.write_bytes(index.read_bytes()[:-7])
    assert main(["data", "show", str(copy), "--sheet", str(tmp_path / "sheet.png"), "--data.image_size", "32"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^train +\d+ +1,437 ", out, re.MULTILINE)
    assert f"damaged: {index} does not match manifest.json" in out
