"""`convneur runs`: what the files of runs say; one damaged run never hides the others, nor is a stale score a score."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from convneur.config import Config, ScheduleConfig, config_text, save_config
from convneur.launch.cli import main
from convneur.launch.runs import Runs
from convneur.records.folder import METRICS_FILE
from convneur.records.metrics import Parsed, parse_metrics
from convneur.records.summary import Summary, write_summary

CONFIG = Config(schedule=ScheduleConfig(epochs=8, warmup_epochs=1))


def make_run(folder: Path, epochs: int = 8, finished: bool = True) -> Path:
    """What a run leaves: four steps an epoch, and an evaluation after each epoch, better by a hundredth every time."""
    folder.mkdir(parents=True)
    save_config(replace(CONFIG, run=replace(CONFIG.run, name=folder.name)), folder / "config.yaml")
    add_epochs(folder, 1, epochs)
    if finished:
        write_summary(Summary(0.01 * epochs, None, epochs=epochs, images=1, seconds=9.0, checkpoint="x"), folder)
    return folder


def add_epochs(folder: Path, first: int, last: int) -> None:
    with (folder / METRICS_FILE).open("a") as file:
        for epoch in range(first, last + 1):
            about = {"step": 4 * epoch, "epoch": float(epoch)}
            file.write(json.dumps(about | {"train/images_per_second": 512.0}) + "\n")
            file.write(json.dumps(about | {"eval/loss": 1.0, "eval/top1": 0.01 * epoch}) + "\n")


def cut(name: str) -> Callable[[Path], object]:
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


def line(number: int, text: bytes) -> Callable[[Path], object]:
    def replaced(run: Path) -> None:
        lines = (run / METRICS_FILE).read_bytes().splitlines(keepends=True)
        (run / METRICS_FILE).write_bytes(b"".join([*lines[:number], text, *lines[number + 1 :]]))

    return replaced


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replaced(run: Path) -> None:
        (run / name).unlink()
        make(run / name)

    return replaced


LATE = 99  # a line after the last
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut summary": (cut("summary.json"), "summary.json: is no valid JSON"),
    "empty summary": (lambda run: (run / "summary.json").write_text("{}"), "summary.json: has no top1"),
    "list for summary": (lambda run: (run / "summary.json").write_text("[1]"), "summary.json: holds no JSON object"),
    "words for a score": (
        lambda run: (run / "summary.json").write_text((run / "summary.json").read_text().replace("0.08", '"good"')),
        "summary.json: top1 is 'good'",
    ),
    "invalid config": (lambda run: (run / "config.yaml").write_text("run: [1"), "config.yaml: not valid YAML"),
    "unknown key": (
        lambda run: (run / "config.yaml").write_text(config_text(CONFIG).replace("  seed:", "  sead:")),
        "config.yaml: run.sead is not a configuration key",
    ),
    "empty config": (lambda run: (run / "config.yaml").write_text(""), "config.yaml: has no run, model"),
    "cut config": (cut("config.yaml"), "config.yaml: "),
    "no config": (lambda run: (run / "config.yaml").unlink(), "it has no config.yaml"),
    "folder for config": (instead("config.yaml", Path.mkdir), "config.yaml: can't be read (Is a directory)"),
    "folder for summary": (instead("summary.json", Path.mkdir), "summary.json: can't be read (Is a directory)"),
    "folder for metrics": (instead(METRICS_FILE, Path.mkdir), "metrics.jsonl: can't be read (Is a directory)"),
    "pipe for config": (instead("config.yaml", os.mkfifo), "config.yaml: is no ordinary file"),
    "pipe for metrics": (instead(METRICS_FILE, os.mkfifo), "metrics.jsonl: is no ordinary file"),
    "device for summary": (
        instead("summary.json", lambda p: p.symlink_to("/dev/zero")),
        "summary.json: is no ordinary",
    ),
    "link loop": (instead("config.yaml", lambda p: p.symlink_to(p)), "config.yaml: can't be read (Too many levels"),
    "cut line": (line(7, b'{"step": 16, "ep\n'), "metrics.jsonl: line 8 is no record"),
    "glued lines": (line(7, b'{"step": 16, "ep'), "metrics.jsonl: line 8 is no record"),
    "NULs": (line(7, b"\0" * 40 + b"\n"), "metrics.jsonl: line 8 is no record"),
    "not UTF-8": (line(7, b"\x80\xfe\xff\n"), "metrics.jsonl: line 8 is no record"),
    "a number": (line(7, b"5\n"), "metrics.jsonl: line 8 is no record"),
    "no step": (line(7, b'{"epoch": 4.0}\n'), "metrics.jsonl: line 8 is no record"),
    "text for a value": (line(7, b'{"step": 16, "epoch": 4, "eval/top1": "x"}\n'), "metrics.jsonl: line 8 is no"),
    "NULs at the end": (line(LATE, b"\0" * 40), "metrics.jsonl: line 17 is no record"),
    "no UTF-8 at the end": (line(LATE, b"\x80\xfe\xff"), "metrics.jsonl: line 17 is no record"),
    "a number at the end": (line(LATE, b"5\n"), "metrics.jsonl: line 17 is no record"),
    "lost end": (lambda run: line(14, b"")(run) or line(14, b"")(run), "metrics.jsonl ends at epoch 7.00, summary"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_in_a_row_and_hides_no_other_run(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b", "c"):
        make_run(runs / name)
    harm, why = DAMAGE[damage]
    harm(runs / "b")
    assert main(["runs", str(runs)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    _, _, first, damaged, last = output.out.splitlines()
    assert first.split() == ["a", "finished", "8.00/8", "8.00%", "512", "-", "-", "-"]
    assert last.split() == ["c", *first.split()[1:]]
    assert damaged.startswith("b    damaged: ")
    assert f"damaged: {why}" in damaged
    assert damaged.split()[-6:] == ["-"] * 6


def test_what_is_no_run_is_not_listed_and_what_cannot_be_looked_into_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run")
    make_run(tmp_path / "a\n\x1b[31mname")
    (tmp_path / "a_file").touch()
    (tmp_path / "study" / "configs").mkdir(parents=True)
    (tmp_path / "moved").symlink_to(tmp_path / "nowhere")
    (tmp_path / "looped").symlink_to(tmp_path / "looped")
    runs = Runs(tmp_path)
    runs.show()
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["a\\n\\x1b[31mname", "looped", "moved", "run"]
    found, _ = runs.look()
    assert [(run.name, run.state.partition(":")[0]) for run in found[1:]] == [
        ("looped", "damaged"),
        ("moved", "damaged"),
        ("run", "finished"),
    ]


def test_a_line_that_is_being_written_is_no_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=3, finished=False)
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 16, "ep')
    (status,), _ = Runs(tmp_path).look()
    assert (status.epoch, status.score, status.state) == (3.0, 0.03, "unknown")


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grows, still = make_run(tmp_path / "grows", 3, finished=False), make_run(tmp_path / "still")
    runs = Runs(tmp_path)
    assert [run.epoch for run in runs.look()[0]] == [3.0, 8.0]
    read: list[int] = []

    def counted(data: bytes, before: int = 0) -> Parsed:
        read.append(data.count(b"\n"))
        return parse_metrics(data, before)

    monkeypatch.setattr("convneur.launch.run_reader.parse_metrics", counted)
    assert [run.epoch for run in runs.look()[0]] == [3.0, 8.0]
    assert read == []
    add_epochs(grows, 4, 4)
    assert [(run.epoch, run.score) for run in runs.look()[0]] == [(4.0, 0.04), (8.0, 0.08)]
    assert read == [2]
    (grows / METRICS_FILE).unlink()  # resumed from an earlier step: another file takes its place
    add_epochs(grows, 1, 1)
    assert [run.epoch for run in runs.look()[0]] == [1.0, 8.0]
    assert read == [2, 2]
    cut("summary.json")(still)
    assert [run.state.partition(":")[0] for run in runs.look()[0]] == ["unknown", "damaged"]


def test_a_longer_run_is_not_finished_by_its_old_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=5)
    (status,), _ = Runs(tmp_path).look()
    assert (status.state, status.epoch, status.epochs) == ("unknown", 5.0, 8)
    assert status.seconds_left == pytest.approx((32 - 20) * CONFIG.data.global_batch_size / 512)
    assert run.is_dir()


def test_damaged_attempts_leave_the_rest_of_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", epochs=5, finished=False)
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_700_000_000))
    record = json.dumps({"time": moment, "event": "start", "job": "1"})
    (run / "attempts.jsonl").write_bytes(record.encode() + b"\n\xff\n")
    assert main(["runs", str(tmp_path)]) == 0
    *_, row, note = capsys.readouterr().out.splitlines()
    assert row.split()[:2] == ["run", "not"]
    assert "5.00/8" in row
    assert "attempts.jsonl: line 2 is no record of an attempt" in note


@pytest.mark.parametrize(
    ("squeue", "state"),
    [
        ("echo 7 RUNNING; echo 8 PENDING", "RUNNING"),
        ("echo 8 PENDING", "stopped"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "stopped"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "unknown: Slurm doesn't answer"),
    ],
)
def test_slurm_is_asked_once_for_all_runs(
    squeue: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in squeue's place: a cluster that doesn't answer can't be had at will."""
    (tmp_path / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{squeue}\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_700_000_000))
    for name, job in (("one", "7"), ("two", "9")):
        run = make_run(tmp_path / "runs" / name, epochs=2, finished=False)
        lines = [{"event": "start"}, {"event": "end", "outcome": "stopped"}, {"event": "start"}]
        lines[-1]["outcome"] = "stopped"
        (run / "attempts.jsonl").write_text(
            "".join(json.dumps(line | {"time": moment, "job": job}) + "\n" for line in lines)
        )
    (one, two), _ = Runs(tmp_path / "runs").look()
    assert (one.state, one.restarts) == (state, 1)
    assert two.state == ("stopped" if state == "RUNNING" else state)
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=7,9" in asked
