"""What others read of a run is JSON by the book: numbers that aren't finite are null."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import load_file, save_file
from small_run import small_config

from convneur.launch.cli import main
from convneur.records.folder import MANIFEST, MODEL_FILE
from convneur.records.listing import find_checkpoint
from convneur.records.log import TrainingLog
from convneur.records.manifest import digest
from convneur.records.metrics import read_metrics
from convneur.system.world import World
from convneur.tasks.classification import ClassificationScores
from convneur.train import train


def strict(text: str) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_metrics_that_are_not_finite(tmp_path: Path, world: World) -> None:
    """Those of an older version, too, once the run goes on."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0.5, "train/loss": NaN, "train/grad_norm": Infinity}\n'
    )
    settings = {"start_step": 1, "total_steps": 2, "steps_per_epoch": 2, "images_per_step": 1, "every_steps": 1}
    log = TrainingLog(tmp_path, world, **settings)
    log.scores(2, ClassificationScores(0.0, 0.0, math.nan, 360), None, {"gate/stage1_mean": math.inf})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(lines[0]) == {"step": 1, "epoch": 0.5, "train/loss": None, "train/grad_norm": None}
    assert [strict(lines[1])[name] for name in ("eval/top1", "eval/loss", "gate/stage1_mean")] == [0.0, None, None]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_evaluation_of_weights_that_are_not_finite(
    digits: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(small_config(digits, 0), world, tmp_path / "run")
    broken = Path(shutil.copytree(find_checkpoint(tmp_path / "run"), tmp_path / "broken"))
    weights = load_file(broken / MODEL_FILE)
    save_file({name: weight * math.nan for name, weight in weights.items()}, broken / MODEL_FILE)
    manifest = json.loads((broken / MANIFEST).read_text())
    (broken / MANIFEST).write_text(json.dumps(manifest | {MODEL_FILE: digest(broken / MODEL_FILE)}))
    monkeypatch.delenv("RANK")
    capfd.readouterr()
    assert main(["eval", str(broken), "--json", "--nproc", "1"]) == 0
    scores = strict(capfd.readouterr().out)
    assert (scores["top1"], scores["loss"], scores["not_finite"]) == (0.0, None, 360)
