"""Studies: what they expand to, what their finished runs say, and a small one for real that is stopped and goes on."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path

import numpy as np
import psutil
import pytest
from places import CONFIGS
from small_run import BATCH, small_config

from convneur.config import save_config
from convneur.data.errors import InputError
from convneur.data.stores.choose import open_store
from convneur.launch.cli import main
from convneur.launch.side_by_side import device_shares
from convneur.models.convneur.config import ModelConfig, variant_named
from convneur.records.folder import METRICS_FILE
from convneur.records.listing import list_checkpoints
from convneur.records.summary import Summary, write_summary
from convneur.settings import load_as
from convneur.studies.fit import Findings, find
from convneur.studies.grid import StudyConfig, StudySettings, best_rates, cost, finished_points, progress, study_runs
from convneur.studies.report import write_report
from convneur.studies.series import member_folder, series_folder
from convneur.studies.words import fit_lines

STUDIES = CONFIGS / "studies"
ENV = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"}
LADDER = ["4x1-1-1-1", "6x1-1-1-1", "8x1-1-1-1", "12x1-1-1-1", "16x1-1-1-1"]


def study(digits: Path, root: Path, **axes: object) -> StudyConfig:
    base = small_config(digits, 1, root=str(root), name="study", keep_checkpoints=1)
    base = replace(base, data=replace(base.data, workers=0))
    sections = {name: getattr(base, name) for name in asdict(base)}
    return StudyConfig(**sections, study=StudySettings(**axes))


def finish(config: StudyConfig, keep: int | None = None) -> None:
    """Leaves what the first `keep` runs would leave, with losses of a known law, without training them."""
    noise = np.random.default_rng(0)
    for place, run in list(study_runs(config).items())[:keep]:
        folder = member_folder(run)
        folder.mkdir(parents=True)
        save_config(run, folder / "config.yaml")
        params = cost(run.model, 32).params
        better = 0.9 if place.placement == "per_stage" else 1.0
        loss = better * (0.3 + (params / 1e5) ** -0.5) * np.exp(noise.normal(0, 0.01))
        record = {"step": 11, "epoch": 1.0, "eval/loss": 9.9, "eval/loss_ema": loss, "eval/top1_ema": 1 - loss / 5}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        made_with = {
            "config": "run: {}",
            "code": {"commit": "c" * 40, "diff": ""},
            "hardware": {"world_size": 2, "threads": "1"},
        }
        (folder / "reproduce.json").write_text(json.dumps(made_with))
        write_summary(Summary(0.1, 1 - loss / 5, epochs=1, images=1408, seconds=1800, checkpoint="none"), folder)


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    axes = {"sizes": LADDER, "held_out": ["20x1-1-1-1"], "seeds": [0, 1]}
    config = study(digits, tmp_path_factory.mktemp("runs"), **axes)
    finish(config)
    return config


@pytest.fixture(scope="module")
def findings(finished: StudyConfig) -> Findings:
    return find(finished, finished_points(finished))


def test_every_axis_reaches_its_runs(digits: Path, tmp_path: Path) -> None:
    axes = {
        "sizes": ["n1"],
        "held_out": ["8x1-1-2-1"],
        "unique_images": [128, 0],
        "epochs": [1, 2],
        "lrs": [1e-3, 2e-3],
    }
    runs = study_runs(study(digits, tmp_path, seeds=[3, 4], **axes))
    assert len(runs) == len({str(member_folder(run)) for run in runs.values()}) == 2 * 2 * 2 * 2 * 2 * 2
    for place, run in runs.items():
        assert run.run.name == place.name
        values = run.model.variant, run.model.placement, run.data.subset, run.schedule.epochs, run.optimizer.lr
        assert (*values, run.run.seed) == tuple(asdict(place).values())
    assert "n1-none-128-e2-lr0.001-seed4" in {place.name for place in runs}


@pytest.mark.parametrize("name", ["digits", "imagenet"])
def test_committed_studies_can_be_fitted(name: str) -> None:
    config = load_as(StudyConfig, [STUDIES / f"{name}.yaml"])
    widths = [variant_named(size).base_width for size in config.study.sizes]
    assert len(config.study.sizes) >= 6
    assert max(widths) ** 2 >= 10 * min(widths) ** 2  # parameters go with the square, and depth comes on top
    assert set(config.study.placements) == {"per_stage", "none"}
    assert config.study.held_out
    assert len(study_runs(config)) > 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--study.sizes", "[n1, m10]"],
            "study.sizes or study.held_out is 'm10', expected one of 'n1', .* such as '24x2",
        ),
        (["--study.sizes", "[7x1-1-1-1]"], "is '7x1-1-1-1', expected .* an even first width"),
        (
            ["--study.sizes", "['timm:resnet18']"],
            "study.sizes or study.held_out is 'timm:resnet18', expected one of 'n1'",
        ),
        (["--task.name", "segmentation"], "--task.name is 'segmentation', expected 'classification', which series "),
        (["--study.held_out", "[n1]"], "study.sizes and study.held_out are .* expected none twice"),
        (["--study.seeds", "[]"], "study.seeds is empty, expected at least one value"),
        (["--study.lrs", "[0.1, 0.1]"], r"study.lrs is \[0.1, 0.1\], expected none twice"),
        (["--study.placements", "[some]"], "study.placements is '.some.', expected a list, each one of 'none', "),
    ],
)
def test_bad_axes(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_as(StudyConfig, overrides=words)


def test_a_free_shape_is_the_variant_of_that_shape() -> None:
    assert variant_named("16x2-2-6-2") == variant_named("n1")
    named, free = (cost(ModelConfig(name, num_classes=10), 32) for name in ("n1", "16x2-2-6-2"))
    assert (named.params, named.stages) == (free.params, free.stages)


def test_subsets_are_nested_balanced_and_fixed(digits: Path) -> None:
    data = small_config(digits, 1).data
    whole = open_store(data, "train")

    def keys(samples: int, seed: int = 0) -> list[str]:
        store = open_store(replace(data, subset=samples, subset_seed=seed), "train")
        assert len(store) == samples == store.shard_sizes.sum()
        counts = np.bincount(store.labels, minlength=10)
        assert counts.max() - counts.min() <= 1
        assert store.index_hash != whole.index_hash
        read = [store.read(sample) for sample in range(samples)]
        assert [one.label for one in read] == store.labels.tolist()
        return [one.key for one in read]

    small, large = keys(64), keys(515)
    assert set(small) < set(large)
    assert keys(64) == small
    assert set(keys(64, seed=1)) != set(small)
    assert len(open_store(replace(data, subset=64), "val")) == 360
    with pytest.raises(InputError, match=r"data\.subset is 2000, but split 'train' of .* has 1437 samples"):
        open_store(replace(data, subset=2000), "train")


def test_the_best_learning_rate_counts_and_a_boundary_is_named(digits: Path, tmp_path: Path) -> None:
    config = study(digits, tmp_path, sizes=["4x1-1-1-1"], placements=["none"], lrs=[1e-3, 2e-3, 4e-3], seeds=[0, 1])
    finish(config)
    points = finished_points(config)
    for best, notes in ((1e-3, 1), (2e-3, 0), (4e-3, 1)):
        tilted = [replace(p, loss=p.loss * (0.5 if p.place.lr == best else 1)) for p in points]
        chosen, said = best_rates(tilted)
        assert {point.place.lr for point in chosen} == {best}
        assert len(chosen) == 2
        assert len(said) == notes


def test_findings_of_a_known_law(findings: Findings) -> None:
    by = {(fit.metric, fit.axis, fit.placement): fit for fit in findings.fits}
    local = by["loss", "parameters", "none"]
    assert local.fit is not None
    assert local.fit.exponent().holds(0.5)
    assert local.fit.floor.holds(0.3)
    assert len(local.points) == 10  # the held-out size is not among them
    (prediction,) = local.predictions
    assert prediction.size == "20x1-1-1-1"
    assert prediction.measured is not None
    assert prediction.predicted.holds(prediction.measured)
    assert prediction.error == pytest.approx(prediction.predicted.value / prediction.measured - 1)
    assert [window.sizes for window in local.windows] == [5]  # four sizes are too few for a second
    assert by["loss", "images seen", "none"].refusal == "1 different numbers of images seen, expected at least 5"
    assert "expected at least 3" in str(by["loss", "parameters and images seen", "none"].refusal)
    (comparison,) = findings.comparisons
    at_equal_compute = comparison.budgets[len(comparison.budgets) // 2]
    assert at_equal_compute.interval is not None
    assert at_equal_compute.interval.high - at_equal_compute.interval.low < 0.1
    assert {point.hours for point in findings.points} == {1.0}  # 1800 s of two ranks


def test_a_study_in_progress_is_refused_a_fit_and_still_reported(digits: Path, tmp_path: Path) -> None:
    config = study(digits, tmp_path / "runs", sizes=LADDER, seeds=[0])
    finish(config, keep=6)
    states = progress(config).values()
    assert sum(state.finished for state in states) == 6
    findings = find(config, finished_points(config))
    assert all(fit.fit is None for fit in findings.fits)
    assert (
        "loss by parameters, local-only, all images, 1 epochs: no fit: 3 different numbers of parameters"
        in "\n".join(fit_lines(findings))
    )
    assert findings.comparisons[0].budgets[0].interval is None
    page = write_report(config, findings, tmp_path)[0].read_text()
    assert "6 of 10 runs are finished" in page
    assert "no interval: no point was run twice" in page


def test_report_holds_all_that_it_shows(finished: StudyConfig, findings: Findings, tmp_path: Path) -> None:
    page, table, *pictures = write_report(finished, findings, tmp_path)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(pictures) == 3  # one length: no isoFLOP curves
    assert 'src="http' not in text
    assert "href" not in text
    assert "It predicts" in text
    assert "24 core h" in text
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 24
    assert {line["commit"] for line in lines} == {"c" * 12}


def test_without_runs_there_is_nothing_to_fit(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(study(digits, tmp_path / "runs"), tmp_path / "study.yaml")
    assert main(["study", "fit", str(tmp_path / "study.yaml")]) == 2
    assert "has no finished run of this study yet" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_sbatch_lines_name_each_missing_run(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study(digits, tmp_path / "runs", sizes=["4x1-1-1-1"], seeds=[0])
    save_config(config, tmp_path / "study.yaml")
    finish(config, keep=1)
    assert (
        main(["study", "run", str(tmp_path / "study.yaml"), "--launch", "print", "--script", "slurm/train_m1.sh"]) == 0
    )
    (line,) = capsys.readouterr().out.splitlines()
    name = "4x1-1-1-1-none-all-e1-lr0.002-seed0"
    saved = series_folder(config) / "configs" / f"{name}.yaml"
    assert line == (
        f"sbatch --job-name={name} slurm/train_m1.sh --config {saved} --run.root {series_folder(config)} "
        f"--data.root {digits}"
    )
    assert saved.is_file()


def test_runs_at_a_time_have_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_shares(3, 2) == [{}, {}, {}]  # none here
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in device_shares(2, 2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in device_shares(3, 1)] == ["3", "5", "6"]
    with pytest.raises(InputError, match="--jobs 3 x --nproc 2 is more than the 4 GPUs here"):
        device_shares(3, 2)


def test_a_small_study_goes_on_where_it_stopped(digits: Path, tmp_path: Path) -> None:
    config = study(digits, tmp_path / "runs", sizes=["4x1-1-1-1"], unique_images=[2 * BATCH], seeds=[4])
    save_config(config, tmp_path / "study.yaml")
    words = [sys.executable, "-P", "-m", "convneur.launch", "study", "run", "study.yaml", "--nproc", "1", "--jobs", "2"]

    def run() -> str:
        result = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=1200)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert "0 of 2 runs are finished" in run()
    first, second = finished_points(config)
    assert (first.images, first.place.unique_images, first.device) == (2 * BATCH, 2 * BATCH, "core")
    assert second.params < first.params
    (second.folder / "summary.json").unlink()
    out = run()
    assert "1 of 2 runs are finished" in out
    assert first.place.name not in out
    assert finished_points(config)[1].loss == second.loss
    assert "resuming from" in (series_folder(config) / "logs" / f"{second.place.name}.log").read_text()


@pytest.mark.slow
def test_the_runs_of_a_study_stop_go_on_and_end_with_it(digits: Path, tmp_path: Path) -> None:
    """Stopped and woken, as by Ctrl-Z and `fg`; then killed, which leaves no process behind, and a checkpoint."""
    config = study(digits, tmp_path / "runs", sizes=["4x1-1-1-1"], unique_images=[256], epochs=[3000], seeds=[4])
    save_config(config, tmp_path / "study.yaml")
    words = ["study", "run", "study.yaml", "--nproc", "1", "--jobs", "1"]
    process = psutil.Popen([sys.executable, "-P", "-m", "convneur.launch", *words], cwd=tmp_path, env=ENV)
    logs = series_folder(config) / "logs"

    def waits_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    waits_for(lambda: any("step 20/" in log.read_text() for log in logs.glob("*.log")))
    family = process.children(recursive=True)
    started = [one for one in family if "train" in one.cmdline()]
    assert len(started) == 2  # the run's launcher and its rank
    process.send_signal(signal.SIGSTOP)
    waits_for(lambda: all(one.status() == psutil.STATUS_STOPPED for one in started))
    process.send_signal(signal.SIGCONT)
    waits_for(lambda: not any(one.status() == psutil.STATUS_STOPPED for one in started))
    process.kill()
    process.wait()
    waits_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started))
    (run,) = [member_folder(run) for run in study_runs(config).values() if member_folder(run).exists()]
    assert list_checkpoints(run / "checkpoints")
    assert "stopped by SIGTERM after " in next(iter(logs.glob("*.log"))).read_text()


def test_damaged_runs_hide_no_others_and_are_not_counted(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Slurm
    config = study(digits, tmp_path / "runs", sizes=LADDER, seeds=[0])
    save_config(config, tmp_path / "study.yaml")
    finish(config)
    cut, stale, unknown, *_ = map(member_folder, study_runs(config).values())
    (cut / "summary.json").write_text('{"top1": 0.')
    (stale / "metrics.jsonl").write_text((stale / "metrics.jsonl").read_text().replace('"epoch": 1.0', '"epoch": 0.5'))
    (unknown / "reproduce.json").write_bytes(b"\xff")
    reasons = (
        f"{cut}/summary.json: is no valid JSON",
        f"{stale}/metrics.jsonl: end at epoch 0.5, but summary.json tells of 1 epochs",
        f"{unknown}/reproduce.json: is no valid JSON",
    )
    for command in ("fit", "report"):
        assert main(["study", command, str(tmp_path / "study.yaml")]) == 0
        said = capsys.readouterr().out
        page = unescape((series_folder(config) / "report.html").read_text()) if command == "report" else said
        assert "7 of 10 runs are finished" in page or "7 runs are finished" in page
        for reason in reasons:
            assert f"left out, for it is damaged: {reason}" in page
    assert main(["study", "status", str(tmp_path / "study.yaml")]) == 0
    said = capsys.readouterr().out
    assert f"damaged: {reasons[0]}" in said
    assert "9 of 10 runs are finished" in said  # what the others lack is only of their results
    (cut / "config.yaml").write_text("")
    assert main(["study", "run", str(tmp_path / "study.yaml"), "--launch", "print"]) == 0
    output = capsys.readouterr()
    assert output.out == "\n"
    assert output.err.startswith(f"warning: left out, for it is damaged: {cut}/config.yaml: has no run, model, data")


def test_runs_that_diverged_are_named_and_left_out(finished: StudyConfig) -> None:
    points = finished_points(finished)
    found = find(finished, [replace(p, loss=float("nan")) if p.place.size == LADDER[0] else p for p in points])
    diverged = [point.place.name for point in points if point.place.size == LADDER[0]]
    assert found.notes == tuple(f"{name} has a loss of nan: left out" for name in diverged)
    assert {fit.refusal for fit in found.fits} <= {
        "4 different numbers of parameters, expected at least 5",
        "1 different numbers of images seen, expected at least 5",
    }


def test_a_loss_that_is_not_finite_is_no_damage(finished: StudyConfig, tmp_path: Path) -> None:
    """In a run's metrics it is null."""
    copy = replace(finished, run=replace(finished.run, root=str(tmp_path)))
    shutil.copytree(series_folder(finished), series_folder(copy))
    file = finished_points(copy)[0].folder / METRICS_FILE
    *lines, last = file.read_text().splitlines()
    diverged = {name: None if "loss" in name else value for name, value in json.loads(last).items()}
    file.write_text("\n".join([*lines, json.dumps(diverged), ""]))
    losses = [point.loss for point in finished_points(copy)]
    assert [math.isnan(loss) for loss in losses] == [True] + [False] * (len(losses) - 1)


def test_no_law_where_nothing_falls_and_no_error_of_nothing(finished: StudyConfig, tmp_path: Path) -> None:
    points = [replace(point, loss=0.5 * point.params**0.1, top1=1.0) for point in finished_points(finished)]
    found = find(finished, points)
    by_size = [fit.refusal for fit in found.fits if fit.axis == "parameters"]
    assert by_size
    for refusal in by_size:
        assert refusal in (
            "it doesn't fall with parameters by more than the noise between runs",
            "a value is 0 or not finite and has no logarithm",
        )
    page = write_report(finished, found, tmp_path)[0].read_text()
    assert "doesn&#x27;t fall with parameters" in page
