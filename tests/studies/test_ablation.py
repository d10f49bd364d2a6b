"""The ablation: what its rows vary, the table made of finished runs, and a small one for real that is stopped."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from places import CONFIGS
from small_run import small_config

from convneur.config import Config, load_config, save_config
from convneur.data.errors import InputError
from convneur.launch.cli import main
from convneur.models.convneur.config import ModelConfig
from convneur.models.describe import describe
from convneur.records.summary import Summary, write_summary
from convneur.settings import load_as
from convneur.studies.ablation import (
    ROWS,
    AblationConfig,
    AblationSettings,
    caption,
    cells,
    run_configs,
    save_table,
    tabulate,
)
from convneur.studies.series import member_folder, series_folder, standing

CPU = torch.device("cpu")
ABLATIONS = CONFIGS / "ablations"
ENV = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"}


def ablation(digits: Path, root: Path, rows: list[str], seeds: list[int]) -> AblationConfig:
    base = small_config(digits, 1, root=str(root), name="study", keep_checkpoints=1)
    sections = {name: getattr(base, name) for name in asdict(base)}
    return AblationConfig(**sections, ablation=AblationSettings(rows, seeds))


def finish(run: Config, top1: float, top1_ema: float | None) -> None:
    """Leaves what a finished run leaves, without training it."""
    folder = member_folder(run)
    folder.mkdir(parents=True)
    save_config(run, folder / "config.yaml")
    write_summary(Summary(top1, top1_ema, epochs=1, images=1408, seconds=1.0, checkpoint="none"), folder)


def test_rows_are_the_papers_and_the_reading_orders() -> None:
    assert {name for name, row in ROWS.items() if row.paper_top1 is None} == {"after_update", "final_state"}
    base = ModelConfig("m3")
    models = [row.applied_to(base) for row in ROWS.values()]
    assert len(set(models)) == len(ROWS)
    assert ROWS["neural_memory"].applied_to(base) == base
    for model in models:
        changed = [key for key, value in asdict(model).items() if value != asdict(base)[key]]
        assert len(changed) <= 1


@pytest.mark.parametrize("name", ["m3", "digits"])
def test_committed_ablations_are_all_rows_by_one_recipe(name: str) -> None:
    config = load_as(AblationConfig, [ABLATIONS / f"{name}.yaml"])
    assert config.ablation.rows == list(ROWS)
    assert len(config.ablation.seeds) >= 2
    runs = run_configs(config)
    assert len(runs) == len(ROWS) * len(config.ablation.seeds)
    assert len({member_folder(run) for run in runs.values()}) == len(runs)
    recipes = {str(asdict(replace(run, run=config.run, model=config.model))) for run in runs.values()}
    assert len(recipes) == 1
    assert {run.run.seed for run in runs.values()} == set(config.ablation.seeds)
    if name == "m3":
        recipe = load_config([ABLATIONS.parent / "m3.yaml"])
        assert replace(runs["neural_memory", 0], run=recipe.run) == recipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ablation.rows", "[se]"], r"--ablation\.rows has 'se', expected names out of local_only, "),
        (["--ablation.rows", "[cbam, cbam]"], r"--ablation\.rows is \['cbam', 'cbam'\], expected at least one"),
        (["--ablation.seeds", "[]"], r"--ablation\.seeds is \[\], expected at least one, and none twice"),
        (["--ablation.seeds", "[a]"], r"--ablation\.seeds is '\[a\]', expected a list, each a whole number"),
        (["--model.variant", "timm:resnet18"], r"--model\.variant is 'timm:resnet18', expected one of 'n1', "),
        (["--task.name", "segmentation"], r"--task\.name is 'segmentation', expected 'classification', which series "),
        (["--ablation.row", "[cbam]"], r"--ablation\.row is not a configuration key; did you mean --ablation\.rows"),
    ],
)
def test_bad_settings(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_as(AblationConfig, overrides=words)


def test_table_of_finished_runs(digits: Path, tmp_path: Path) -> None:
    config = ablation(digits, tmp_path, ["local_only", "neural_memory", "titans"], [0, 1, 2])
    scores = {0: (0.1, 0.90), 1: (0.2, 0.92), 2: (0.3, 0.94)}
    for (row, seed), run in run_configs(config).items():
        if row == "local_only" or (row == "neural_memory" and seed == 1):
            finish(run, *scores[seed])
    stand = standing(run_configs(config), "ablation")
    assert (len(stand.finished), len(stand.missing), stand.damaged) == (4, 5, {})
    finish(run_configs(config)["neural_memory", 0], 0.9, 0.9)
    (member_folder(run_configs(config)["neural_memory", 0]) / "summary.json").write_text("{")
    assert [*standing(run_configs(config), "ablation").damaged] == [("neural_memory", 0)]
    local, memory, titans = tabulate(config, CPU)
    assert local.top1 == pytest.approx({0: 90.0, 1: 92.0, 2: 94.0})
    assert (local.top1_mean, local.top1_std) == pytest.approx((92.0, 2.0))
    assert (memory.top1_mean, memory.top1_std) == (92.0, None)
    assert (titans.top1_mean, titans.top1_std) == (None, None)
    assert min(result.latency_ms for result in (local, memory, titans)) > 0
    cost = describe(run_configs(config)["titans", 0].model, 32)
    assert (titans.params, titans.gmacs) == (cost.params, cost.gmacs)
    assert cells(local)[-2:] == ("92.00 ± 2.00", "78.2")
    assert cells(titans)[-2:] == ("-", "79.6")

    note = caption(config, [local, memory, titans], CPU)
    assert "averaged weights after 1 epochs" in note
    assert "3 of 3 seeds" in note
    folder = series_folder(config)
    assert save_table(folder, [local, memory, titans], note) == [
        folder / f"table.{kind}" for kind in ("json", "csv", "md")
    ]
    saved = json.loads((folder / "table.json").read_text())
    assert saved["caption"] == note
    assert [line["row"] for line in saved["rows"]] == ["local_only", "neural_memory", "titans"]
    assert saved["rows"][0]["top1_std"] == pytest.approx(2.0)
    with (folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(top1) for top1 in lines[0]["top1"].split()] == [90.0, 92.0, 94.0]
    assert (folder / "table.md").read_text().count("\n| ") == 4


def test_a_run_by_another_recipe_is_not_taken_for_one_of_ours(digits: Path, tmp_path: Path) -> None:
    config = ablation(digits, tmp_path, ["local_only"], [0])
    finish(next(iter(run_configs(config).values())), 0.5, None)
    longer = replace(config, schedule=replace(config.schedule, epochs=2))
    with pytest.raises(InputError, match=r"local_only-seed0/config\.yaml is not what this ablation would train there"):
        standing(run_configs(longer), "ablation")


def test_dry_run_prints_costs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["ablate", "--config", str(ABLATIONS / "digits.yaml"), "--dry-run", "--ablation.rows", "[local_only, cbam]"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "local_only" in out
    assert "paper GMACs" in out
    assert "top-1" not in out
    assert not list(tmp_path.iterdir())


def test_a_small_ablation_goes_on_where_it_stopped(digits: Path, tmp_path: Path) -> None:
    config = ablation(digits, tmp_path / "runs", ["local_only", "cbam"], [4])
    save_config(config, tmp_path / "study.yaml")
    words = [sys.executable, "-P", "-m", "convneur.launch", "ablate", "--config", "study.yaml", "--nproc", "1"]

    def run() -> str:
        result = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=1200)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    out = run()
    assert "[1/2] local_only, seed 4" in out
    assert "[2/2] cbam, seed 4" in out
    table = json.loads((series_folder(config) / "table.json").read_text())
    assert all(10 < line["top1"]["4"] <= 100 for line in table["rows"])

    # As if it had been killed between the last checkpoint of one run and its summary.
    (member_folder(run_configs(config)["cbam", 4]) / "summary.json").unlink()
    out = run()
    assert "local_only, seed 4" not in out
    assert "resuming from" in out
    again = json.loads((series_folder(config) / "table.json").read_text())
    assert [line["top1"] for line in again["rows"]] == [line["top1"] for line in table["rows"]]
