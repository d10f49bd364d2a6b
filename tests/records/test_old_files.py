"""What older versions wrote is read, scored and resumed by this one: tests/golden/old."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import GOLDEN
from resave import resave
from safetensors.torch import load_file

from convneur.config import load_config
from convneur.data.config import DataConfig
from convneur.data.inspect.verify import verify_dataset
from convneur.data.stores.choose import open_store
from convneur.launch.cli import main
from convneur.records.metrics import read_metrics
from convneur.records.summary import read_summary
from convneur.system.world import World

OLD = GOLDEN / "old"
LAST = "step-00000009"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy at the place, relative to the working folder, at which it was made."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "old"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint's files hold, by the file's name and the parameter's."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)} {k}": v for file in files for k, v in load_file(file).items()}


def test_an_old_dataset_is_whole(old: Path) -> None:
    store = open_store(DataConfig(root="old/data"), "train")
    assert (len(store), len(store.classes)) == (48, 4)
    verified = verify_dataset(old / "data", processes=1)
    assert [(found.split, found.samples, found.denied, found.shards) for found in verified] == [
        ("train", 48, (), ()),
        ("val", 4, (), ()),
    ]


def test_an_old_checkpoint_is_loaded_and_saved_to_the_bit(old: Path, world: World) -> None:
    checkpoint = old / "run" / "checkpoints" / LAST
    config = load_config([checkpoint / "config.yaml"])
    before, after = tensors(checkpoint), tensors(resave(config, world, checkpoint, old / "again"))
    assert before.keys() == after.keys()
    assert len({name.split()[0] for name in before}) == 4  # weights, their average, two moments
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_old_run_is_listed_and_goes_on(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From step 5 it makes the old version's steps; other processors round otherwise, so not to the bit."""
    summary = read_summary(old / "run")
    assert main(["runs", "old"]) == 0
    assert summary is not None
    assert f"{100 * summary.score:.2f}" in capsys.readouterr().out

    then = [line for line in read_metrics(old / "run") if line["step"] > 5]
    wanted = tensors(old / "run" / "checkpoints" / LAST)
    shutil.rmtree(old / "run" / "checkpoints" / LAST)
    (old / "run" / "summary.json").unlink()
    words = ["train", "--config", "old/run/config.yaml", "--resume", "auto", "--launch", "local", "--nproc", "1"]
    command = [sys.executable, "-P", "-m", "convneur.launch", *words]
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"}
    resumed = subprocess.run(command, env=env, cwd=old.parent, capture_output=True, text=True, timeout=1200)
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    now = [line for line in read_metrics(old / "run") if line["step"] > 5]
    assert [line["step"] for line in now] == [line["step"] for line in then]
    for name in ("train/loss", "train/lr", "eval/top1", "eval/loss"):
        assert [line[name] for line in now if name in line] == pytest.approx(
            [line[name] for line in then if name in line], rel=2e-4
        ), name
    found = tensors(old / "run" / "checkpoints" / LAST)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
