"""The command line: what it refuses and how, what it starts, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_run import BATCH, VARIANT, small_config

from convneur.config import Config, save_config
from convneur.launch.cli import main
from convneur.launch.folder import run_folder
from convneur.records.metrics import read_metrics
from convneur.settings import config_keys

CONVNEUR = [sys.executable, "-P", "-m", "convneur.launch"]
OVERFLOWS = "overflows on an image of 32 x 32 pixels"
ENV = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"}

BAD_LINES = {
    "": "the following arguments are required: COMMAND",
    "fly": "argument COMMAND: invalid choice: 'fly' (choose from",
    "train --nprocs 2": "--nprocs is not a flag of `convneur train`; did you mean --nproc?",
    "train --nproc two": "argument --nproc: invalid int value: 'two'; see `convneur train --help`",
    "train --nproc 0": "--nproc is 0, expected ",
    "train --epochs 3": "--epochs is not a flag of `convneur train`; did you mean --schedule.epochs?",
    "train --optimizer.lrr 3": "--optimizer.lrr is not a configuration key; did you mean --optimizer.lr?",
    "train --optimizer.lr fast": "--optimizer.lr is 'fast', expected a number",
    "train --run.seed": "--run.seed has no value, expected --run.seed VALUE",
    "train stray": "'stray' belongs to no flag; see `convneur train --help`",
    "train --config absent.yaml": "absent.yaml: can't be read (No such file or directory), expected a YAML file",
    "train --launch env": "--launch env needs RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the env",
    "train": "datasets/imagenet does not exist: write one with `convneur prepare",
    "train --data.root empty": "empty holds no complete dataset (no manifest.json): write one with",
    "train --data.root DIGITS": "model.num_classes is 1000 but DIGITS has 10 classes: set model.num_classes to 10",
    "train --config digits.yaml --nproc 3": f"data.global_batch_size is {BATCH}, expected a multiple of 3 (3 ranks",
    "train --config digits.yaml --nproc 16": "data.lanes 8 is not a multiple of 16 (16 ranks",
    "train --config digits.yaml --check 3": f"data.global_batch_size is {BATCH}, expected a multiple of 3 (3 ranks",
    "train --config digits.yaml --check 2 --schedule.warmup_epochs 0.99": "rounds to all 11 steps of the run",
    "train --config digits.yaml --nproc 2 --schedule.warmup_epochs 0.99": "rounds to all 11 steps of the run",
    "train --config digits.yaml --check 2 --model.memory.inner_lr 1e9 --model.memory.chunk_length 1": OVERFLOWS,
    "submit --config digits.yaml --dry-run --model.memory.inner_lr 1e9 --model.memory.chunk_length 1": OVERFLOWS,
    "train --config digits.yaml --check 0": "--check is 0, expected the number of ranks, at least 1",
    "train --config digits.yaml --schedule.min_lr 1": "schedule.min_lr is 1.0, expected at most optimizer.lr, 0.002",
    "train --config digits.yaml --deepspeed.train_batch_size 3": "deepspeed.train_batch_size is 3, but",
    "train --config digits.yaml --deepspeed.zero_optimization.stge 3": "did you mean deepspeed.zero_opt",
    "train --config digits.yaml --run.root a_file": "run.root is 'a_file', where no folder can be made",
    "eval": "the following arguments are required: CHECKPOINT_OR_RUN",
    "eval run --optimizer.lr 3": "--optimizer.lr is a configuration key, and `convneur eval` takes none",
    "eval run --ema --raw": "argument --raw: not allowed with argument --ema",
    "eval run --nproc 0": "--nproc is 0, expected ",
    "info": "the following arguments are required: variant",
    "info m10": "--model.variant is 'm10', expected one of 'n1'",
    "info m1 --train.accumulation 3": "--train.accumulation has no bearing on a model's size",
    "info m1 --image-size 31": "image size is 31, expected at least 32 pixels",
    "prepare": "the following arguments are required: DATASET",
    "prepare digits --out a_file": "a_file",
}


@pytest.fixture
def folder(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration, an empty folder and a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    save_config(small_config(digits, 1), tmp_path / "digits.yaml")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").touch()
    return tmp_path


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_is_one_line_and_writes_nothing(
    line: str, digits: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(line.replace("DIGITS", str(digits)).split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("convneur: error: ")
    assert BAD_LINES[line].replace("DIGITS", str(digits)) in output.err
    assert output.err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_help_loads_nothing_slow() -> None:
    script = "import sys; from convneur.launch.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], env=ENV, capture_output=True, text=True, check=True).stdout
    assert all(command in output for command in ("prepare", "train", "eval", "info", "doctor"))
    loaded = set(output.split())
    assert "convneur.launch.commands.train" in loaded
    assert not loaded & {"torch", "timm", "deepspeed", "jsonargparse", "numpy", "yaml", "rich"}


def test_configuration_errors_load_nothing_slow(folder: Path) -> None:
    script = (
        "import sys; from convneur.launch.cli import main; main(['train', '--optimizer.lrr', '3']); print(*sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", script], env=ENV, capture_output=True, text=True, check=True).stdout
    assert "convneur.config" in output.split()
    assert not set(output.split()) & {"torch", "timm", "deepspeed"}


def test_train_help_explains_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    flags = [line.split()[0] for line in output.splitlines() if line.startswith("  --")]
    keys = list(config_keys(Config))
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    assert set(flags) >= {f"--{key}" for key in keys if key not in sections}
    assert not {f"--{section}" for section in sections} & set(flags)
    entries = output.split("configuration keys")[1].split("\n  --")[1:]
    assert not [entry for entry in entries if " ".join(entry.split()[2:]).startswith("(type:")], (
        "keys without a docstring"
    )
    peak = "peak learning rate, for a global batch of lr_batch_size images. (type: float, default: 0.001)"
    assert peak in " ".join(output.split())


def test_prepare_is_quick_when_done_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "digits", "--out", str(tmp_path / "digits")]) == 0
    assert main(["prepare", "digits", "--out", str(tmp_path / "digits")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/digits: written\n{tmp_path}/digits: already there, and intact\n"


def test_folders_of_other_runs_are_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_config(folder, 1).run
    for expected in ("runs/small", "runs/small-2", "runs/small-3"):
        with run_folder(run, "never") as (chosen, _):
            assert chosen == Path(expected)
            assert chosen.is_dir()
            (chosen / "config.yaml").touch()
    assert capsys.readouterr().out.endswith(
        "convneur: runs/small holds another run, so this one goes to runs/small-3\n"
    )
    with run_folder(run, "auto") as (chosen, _):
        assert chosen == Path("runs/small")
    with run_folder(run, "runs/small") as (chosen, _):
        assert chosen == Path("runs/small-4")
    assert not Path("runs/small-4").exists(), "a folder that nothing was written to"


def test_a_folder_without_a_run_is_removed_with_those_made_for_it(folder: Path) -> None:
    with pytest.raises(RuntimeError), run_folder(small_config(folder, 1).run, "never"):
        raise RuntimeError
    assert not Path("runs").exists()


def convneur(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CONVNEUR, *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A working folder in which a run was trained with two processes, and what that printed."""
    folder = tmp_path_factory.mktemp("trained")
    save_config(small_config(digits, 1), folder / "digits.yaml")
    result = convneur("train", "--config", "digits.yaml", "--nproc", "2", "--run.seed", "5", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_train_says_how_well_where_and_what_next(trained: tuple[Path, str]) -> None:
    folder, output = trained
    summary = json.loads((folder / "runs/small/summary.json").read_text())
    accuracy, checkpoint, following = output.splitlines()[-3:]
    assert accuracy.startswith(f"accuracy    {summary['top1']:.2%} top-1")
    assert f"({summary['top1_ema']:.2%} with averaged weights)" in accuracy
    assert checkpoint == f"checkpoint  {summary['checkpoint']}"
    assert (folder / summary["checkpoint"] / "manifest.json").is_file()
    assert following == "next        convneur eval runs/small"
    assert "seed: 5" in (folder / "runs/small/config.yaml").read_text()


def test_its_next_command_gives_the_same_accuracy(trained: tuple[Path, str]) -> None:
    folder, output = trained
    summary = json.loads((folder / "runs/small/summary.json").read_text())
    for flags, top1 in (((), summary["top1"]), (("--ema",), summary["top1_ema"])):
        result = convneur(*output.split()[-2:], "--json", "--nproc", "1", *flags, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["top1"] == top1
        assert json.loads(result.stdout)["images"] == 360


def test_saved_configuration_repeats_the_run_in_another_folder(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    result = convneur("train", "--config", "runs/small/config.yaml", "--nproc", "2", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("convneur: runs/small holds another run, so this one goes to runs/small-2\n")
    first, second = (
        [record["train/loss"] for record in read_metrics(folder / "runs" / name) if "train/loss" in record]
        for name in ("small", "small-2")
    )
    assert len(first) > 5
    assert first == second


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train --config digits.yaml --model.variant n2 --run.name other --resume runs/small",
            f"has model.variant = {VARIANT}",
        ),
        ("eval runs/absent", "no checkpoint in runs/absent"),
        ("eval --launch local runs/small --split nowhere", "nowhere"),
    ],
)
def test_what_only_ranks_find_out_is_said_once(trained: tuple[Path, str], words: str, message: str) -> None:
    folder, _ = trained
    before = sorted(folder.rglob("*"))
    result = convneur(*words.split(), "--nproc", "2", cwd=folder)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("convneur: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_a_crash_is_a_traceback_and_a_line(trained: tuple[Path, str], digits: Path, tmp_path: Path) -> None:
    (tmp_path / "runs/small").mkdir(parents=True)
    (tmp_path / "runs/small/tensorboard").touch()  # a file where a folder belongs
    save_config(small_config(digits, 1), tmp_path / "digits.yaml")
    result = convneur("train", "--config", "digits.yaml", "--nproc", "2", "--resume", "auto", cwd=tmp_path)
    assert result.returncode == 1
    assert "FileExistsError: " in result.stderr
    *_, last = result.stderr.splitlines()
    assert last.startswith("convneur: error: rank ")
    assert last.endswith(" failed with exit status 1; its traceback is above")
    assert "ChildFailedError" not in result.stderr


@pytest.mark.parametrize(
    ("sent", "to", "status", "said"),
    [
        (signal.SIGINT, "launcher", 130, ""),
        (signal.SIGKILL, "rank", 137, "convneur: error: rank 1 was killed by SIGKILL\n"),
    ],
)
def test_signals_leave_no_process_behind(
    digits: Path, tmp_path: Path, sent: signal.Signals, to: str, status: int, said: str
) -> None:
    save_config(small_config(digits, 1), tmp_path / "digits.yaml")
    command = [*CONVNEUR, "train", "--config", "digits.yaml", "--nproc", "2", "--schedule.epochs", "1000"]
    launcher = psutil.Popen(
        command, cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 1200
    while not list(tmp_path.glob("runs/small/metrics.jsonl")):
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = sorted(launcher.children(), key=lambda rank: int(rank.environ()["RANK"]))
    below = launcher.children(recursive=True)
    assert [rank.environ()["OMP_NUM_THREADS"] for rank in ranks] == ["1", "1"]
    (launcher if to == "launcher" else ranks[1]).send_signal(sent)
    assert launcher.wait(timeout=1200) == status
    assert launcher.stderr.read().endswith(said)
    _, alive = psutil.wait_procs(below, timeout=1200)
    assert not alive
