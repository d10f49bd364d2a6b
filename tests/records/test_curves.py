"""Curves of many runs: told apart, and drawn although some of the runs are damaged."""

import json
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from convneur.launch.cli import main
from convneur.records.curves import Curves, _many


def make_run(folder: Path, epochs: int = 3) -> Path:
    folder.mkdir()
    lines = [
        {"step": epoch, "epoch": float(epoch), "train/loss": 2.0 / epoch, "eval/loss": 1.0 / epoch, "eval/top1": 0.5}
        for epoch in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_no_two_of_thirty_runs_look_alike() -> None:
    runs: dict[str, Curves] = {
        f"run{number}": {name: [(0.0, 1.0), (1.0, 0.1 * number)] for name in ("train/loss", "eval/top1")}
        for number in range(30)
    }
    figure = _many(runs)
    (legend,) = figure.legends
    for lines in (*(axis.lines for axis in figure.axes), legend.get_lines()):
        assert len(lines) == 30
        # What is drawn, not its name: matplotlib calls all styles of its own "--".
        assert len({(line.get_color(), line.get_marker(), str(line._unscaled_dash_pattern)) for line in lines}) == 30
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    plt.close(figure)


def test_a_damaged_run_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, cut, empty = (make_run(tmp_path / name) for name in ("good", "cut", "empty"))
    (cut / "metrics.jsonl").write_bytes(b"\x80\xff\n" + (cut / "metrics.jsonl").read_bytes())
    (empty / "metrics.jsonl").unlink()
    (tmp_path / "looped").mkdir()
    (tmp_path / "looped" / "metrics.jsonl").symlink_to(tmp_path / "looped" / "metrics.jsonl")
    picture = tmp_path / "all.png"
    assert main(["plot", *map(str, (good, cut, empty, tmp_path / "looped")), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: {cut}/metrics.jsonl: line 1 is no record of metrics")
    assert second == f"warning: left out: {empty}/metrics.jsonl holds no metrics, expected the folder of a run"
    assert third.startswith(f"warning: left out: {tmp_path}/looped/metrics.jsonl: can't be read (Too many levels")


@pytest.mark.parametrize("name", ["absent/curve.png", "curve.xyz", "good"])
def test_a_picture_that_cannot_be_written_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(make_run(tmp_path / "good").iterdir())
    assert main(["plot", str(tmp_path / "good"), "-o", str(tmp_path / name)]) == 2
    assert f"the picture {tmp_path / name} can't be written" in capsys.readouterr().err
    assert sorted((tmp_path / "good").iterdir()) == before
