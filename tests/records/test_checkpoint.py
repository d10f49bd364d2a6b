"""Checkpoints are whole or not there: commit order, damage, falling back, and refusing what doesn't fit."""

import errno
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_run import BATCH, STEPS, VARIANT, small_config
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import normalize

from convneur.config import Config, load_config
from convneur.data.errors import InputError, is_outage
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import write_split
from convneur.data.stores.choose import open_store
from convneur.data.stores.tar import TarStore
from convneur.data.views.decode import decode
from convneur.data.views.transforms import EvalTransform
from convneur.errors import NonFiniteError, SaveError
from convneur.models.convneur.model import ConvNeur
from convneur.monitoring.config import GuardConfig
from convneur.records import checkpoint as checkpoints
from convneur.records import manifest as manifests
from convneur.records import upkeep
from convneur.records.checkpoint import load_weights, read_classes, read_state
from convneur.records.folder import BEST, CHECKPOINTS, CLASSES_FILE, LATEST, MANIFEST
from convneur.records.listing import find_checkpoint, list_checkpoints
from convneur.records.manifest import newest_intact
from convneur.records.metrics import read_metrics
from convneur.records.retention import Best
from convneur.run.keeper import LAST_TRIES
from convneur.run.resume import best_so_far, choose_checkpoint
from convneur.system.world import World
from convneur.tasks.classification import Classification, ClassificationScores
from convneur.tools.evaluate import evaluate_checkpoint, trained_classes
from convneur.tools.explain import explain
from convneur.tools.export import export_checkpoint
from convneur.tools.trained import open_trained
from convneur.train import train

TOP1 = Classification.metrics[0]


@pytest.fixture(scope="module")
def config(digits: Path) -> Config:
    config = small_config(digits, 1, keep_checkpoints=2)
    return replace(config, data=replace(config.data, workers=0))


@pytest.fixture(scope="module")
def trained(world: World, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config, world, folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_keeps_the_newest(trained: Path) -> None:
    assert [p.name for p in list_checkpoints(trained / "checkpoints")] == [f"step-{STEPS:08d}", "step-00000008"]


def test_manifest_names_every_file(trained: Path) -> None:
    newest = find_checkpoint(trained)
    manifest = json.loads((newest / "manifest.json").read_text())
    files = {str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()}
    assert files - {"manifest.json"} == set(manifest)
    assert {"config.yaml", "state.json", "model.safetensors", "ema.safetensors"} <= files
    assert all(entry["bytes"] == (newest / name).stat().st_size for name, entry in manifest.items())


def test_ema_is_an_average_of_the_weights(trained: Path) -> None:
    newest = find_checkpoint(trained)
    raw, averaged = load_weights(newest, averaged=False), load_weights(newest, averaged=True)
    assert raw.keys() == averaged.keys()
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


@pytest.mark.parametrize("name", ["optimizer/exp_avg.safetensors", "ema.safetensors", "state.json"])
def test_a_flipped_bit_is_found_and_the_previous_checkpoint_taken(run: Path, world: World, name: str) -> None:
    newest, previous = list_checkpoints(run / "checkpoints")
    flip_a_byte(newest / name)
    found, faults = newest_intact([newest, previous], world)
    assert found == previous
    assert faults == [f"{newest}: {name} is not as it was written"]


def test_resume_goes_on_from_the_previous_one_and_says_so(
    run: Path, trained: Path, world: World, config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    newest, previous = list_checkpoints(run / "checkpoints")
    os.truncate(newest / "model.safetensors", 100)
    train(config, world, run, resume="auto")
    said = capfd.readouterr().out
    assert f"warning: damaged checkpoint left out: {newest}: model.safetensors is not as it was written" in said
    assert f"resuming from {previous}, 8 of {STEPS} steps made" in said
    mended = load_file(newest / "model.safetensors")
    original = load_file(find_checkpoint(trained) / "model.safetensors")
    assert all(torch.equal(mended[name], original[name]) for name in original)
    assert [r["step"] for r in read_metrics(run)] == [r["step"] for r in read_metrics(trained)]


def test_lamb_which_counts_steps_otherwise_is_resumed_to_the_bit(world: World, config: Config, tmp_path: Path) -> None:
    lamb = replace(
        config,
        run=replace(config.run, keep_checkpoints=3),
        optimizer=replace(config.optimizer, name="lamb"),
        deepspeed=config.deepspeed | {"zero_optimization": {"stage": 0}},
    )
    train(lamb, world, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for later in list_checkpoints(tmp_path / "again" / "checkpoints")[:2]:
        shutil.rmtree(later)
    train(lamb, world, tmp_path / "again", resume="auto")
    a, b = (find_checkpoint(tmp_path / name) for name in ("whole", "again"))
    assert {path.name for path in (a / "optimizer").iterdir()} == {"exp_avg.safetensors", "exp_avg_sq.safetensors"}
    assert set(json.loads((a / "optimizer.json").read_text())["steps"].values()) == {STEPS}
    assert (a / "optimizer.json").read_text() == (b / "optimizer.json").read_text()
    first, second = (load_file(path / "optimizer" / "exp_avg_sq.safetensors") for path in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fewer_epochs_than_are_made_are_refused_and_nothing_is_touched(run: Path, world: World, config: Config) -> None:
    """Steps that a run doesn't reach any more would be taken for those of a course that it has left."""
    longer = replace(config, schedule=replace(config.schedule, epochs=2))
    train(longer, world, run, resume="auto")
    before = contents(run)
    assert f"checkpoints/step-{2 * STEPS:08d}/manifest.json" in before
    with pytest.raises(InputError, match=r"step-00000022 has 22 steps made, .* ends after 11; give at least 2 epochs"):
        train(config, world, run, resume="auto")
    assert contents(run) == before


def test_the_best_of_a_whole_history_is_kept(
    trained: Path, run: Path, world: World, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step's evaluation counts, also when the run is made longer and never gets as good again."""
    summary = json.loads((run / "summary.json").read_text())
    best = max(summary["top1"], summary["top1_ema"])
    state = read_state(find_checkpoint(run))
    assert state.best is not None
    assert (state.best.step, state.best.score) == (STEPS, best)
    assert json.loads((run / CHECKPOINTS / BEST).read_text())["step"] == STEPS

    # Versions that saved the last step before they evaluated it didn't know; the metrics do.
    unknowing = replace(state, best=None)
    checkpoint = find_checkpoint(run)
    assert best_so_far(run, checkpoint, unknowing, TOP1, world) == (state.best, [])

    scores = ClassificationScores(best - 0.001, 1.0, 0.0, 360)  # of the second epoch, raw and averaged
    monkeypatch.setattr("convneur.tasks.classification.evaluate", lambda *_: scores)
    worse = replace(config, schedule=replace(config.schedule, epochs=2), run=replace(config.run, keep_checkpoints=1))
    train(worse, world, run, resume="auto")
    assert [path.name for path in list_checkpoints(run / CHECKPOINTS)] == ["step-00000022", f"step-{STEPS:08d}"]
    assert json.loads((run / CHECKPOINTS / BEST).read_text())["step"] == STEPS
    assert read_state(find_checkpoint(run)).best == state.best
    assert json.loads((run / "summary.json").read_text())["checkpoint"].endswith("step-00000022")

    # A damaged one is no longer the best.
    flip_a_byte(run / CHECKPOINTS / f"step-{STEPS:08d}" / "ema.safetensors")
    newest = find_checkpoint(run)
    again, faults = best_so_far(run, newest, read_state(newest), TOP1, world)
    assert again is not None
    assert again.step == 22
    assert faults == [f"{run / CHECKPOINTS / 'step-00000011'}: ema.safetensors is not as it was written"]


def test_a_best_evaluation_that_could_not_be_saved_is_not_the_best(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its weights are gone, so BEST goes on naming those that are there."""
    accuracies = iter([0.5, 0.9, 0.7])  # after each of the three epochs
    monkeypatch.setattr(
        "convneur.tasks.classification.evaluate", lambda *_: ClassificationScores(next(accuracies), 1.0, 0.0, 360)
    )
    short = replace(
        config,
        run=replace(config.run, checkpoint_every_steps=100, eval_every_epochs=1),
        schedule=replace(config.schedule, epochs=3),
        data=replace(config.data, subset=2 * BATCH),
        train=replace(config.train, ema_decay=0.0),
    )
    real = checkpoints._publish

    def failing(temporary: Path, final: Path) -> None:
        if final.name == "step-00000004":
            raise OSError(28, "No space left on device")
        real(temporary, final)

    monkeypatch.setattr(checkpoints, "_publish", failing)
    train(short, world, tmp_path)
    assert "ALARM: after 4 steps" in capfd.readouterr().out
    best = Best(6, 0.7, "raw")
    assert json.loads((tmp_path / CHECKPOINTS / BEST).read_text()) == {"step": 6, "top1": 0.7, "weights": "raw"}
    assert read_state(find_checkpoint(tmp_path)).best == best


@pytest.mark.parametrize("name", ["step-00000011.bak", "step-00000012-keep", "step-best", "step-12", "step-0000000x"])
def test_other_names_beside_checkpoints_are_left_alone(run: Path, world: World, config: Config, name: str) -> None:
    copy = run / CHECKPOINTS / name
    shutil.copytree(find_checkpoint(run), copy)
    (run / CHECKPOINTS / "step-00000099").touch()
    before = contents(copy)
    assert copy not in list_checkpoints(run / CHECKPOINTS)
    assert [path.name for path in list_checkpoints(run / CHECKPOINTS)] == [f"step-{STEPS:08d}", "step-00000008"]
    if name == "step-00000011.bak":  # one training run for all of them
        longer = replace(
            config, schedule=replace(config.schedule, epochs=2), run=replace(config.run, keep_checkpoints=1)
        )
        train(longer, world, run, resume="auto")
        assert find_checkpoint(run).name == "step-00000022"
    assert contents(copy) == before
    assert open_trained(copy).checkpoint == copy  # unless it is asked for


def test_checkpoints_are_in_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("step-99999999", "step-100000000", "step-00000001", "step-000000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "step-00000002").mkdir()  # nothing of a checkpoint is in it
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-100000000", "step-99999999", "step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "classes.json", "manifest.json"])
def test_damage_is_named_by_whoever_reads(run: Path, world: World, tmp_path: Path, name: str) -> None:
    checkpoint = find_checkpoint(run)
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    readers = (
        lambda: evaluate_checkpoint(run, world),
        lambda: export_checkpoint(run, "safetensors", tmp_path / "out.safetensors"),
        lambda: explain(run, image),
    )
    whole = (checkpoint / name).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"{}", b"[]", bytes(len(whole)), whole[:-9] + b"\0" + whole[-8:]):
        (checkpoint / name).write_bytes(damaged)
        for read in readers:
            with pytest.raises(InputError, match=rf"^{checkpoint} is damaged: (\w|\.)+ .*; restore it") as error:
                read()
            assert name in str(error.value) or "is not as it was written" in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_cleaning_up_is_not_saving(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A leftover and old checkpoints that can't be removed, a link, and a LATEST that can't be written: warnings."""
    folder, elsewhere = tmp_path / CHECKPOINTS, tmp_path / "elsewhere"
    (folder / "tmp-step-00000004").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "step-00000002").symlink_to(elsewhere)
    (folder / LATEST).mkdir()

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    flush = upkeep.fsync

    def fail_for_names(path: Path) -> None:
        if path == folder:
            raise OSError(5, "Input/output error")
        flush(path)

    monkeypatch.setattr(upkeep.shutil, "rmtree", refuse)
    monkeypatch.setattr(upkeep, "fsync", fail_for_names)
    train(replace(config, run=replace(config.run, keep_checkpoints=1, keep_best=False)), world, tmp_path)
    said = capfd.readouterr().out
    assert "ALARM" not in said
    assert "step-00000004 is saved, but LATEST can't say so" in said
    assert "step-00000004 is saved, but may not outlast a failure of this machine" in said
    assert "step-00000004 is no longer needed, but can't be removed wholly" in said
    assert "tmp-step-00000004 can't be removed; it is of no use to the run" in said
    assert [path.name for path in list_checkpoints(folder)] == [f"step-{STEPS:08d}"]
    assert newest_intact(list_checkpoints(folder), world)[1] == []
    assert elsewhere.is_dir()
    assert (folder / "step-00000002").is_symlink()


def test_what_lies_where_a_checkpoint_has_to_go_steps_aside(tmp_path: Path) -> None:
    """Of a file, a link, a folder of somebody's and a damaged checkpoint, only the last is taken for the run's own."""
    whole = tmp_path / "whole"
    (whole / "optimizer").mkdir(parents=True)
    (whole / "manifest.json").touch()
    (tmp_path / "step-00000001").write_text("mine")
    (tmp_path / "step-00000002").symlink_to(whole)
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "mine").touch()
    shutil.copytree(whole, tmp_path / "step-00000004")
    (tmp_path / "tmp-mine").mkdir()
    (tmp_path / "tmp-step-00000009").touch()
    for step in range(1, 5):
        temporary = Path(shutil.copytree(whole, tmp_path / f"tmp-step-0000000{step}"))
        checkpoints._publish(temporary, tmp_path / f"step-0000000{step}")
    upkeep.remove_leftovers(tmp_path)
    asides = [f"step-0000000{step}.aside" for step in (1, 2, 3)]
    named = [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "tmp-mine", "tmp-step-00000009", *asides, *named}
    assert (tmp_path / asides[0]).read_text() == "mine"
    assert (tmp_path / asides[1]).readlink() == whole
    assert (tmp_path / asides[2] / "mine").is_file()


def test_a_kill_between_two_names_loses_no_checkpoint(run: Path, world: World) -> None:
    """As a checkpoint is made anew under its name, the one before has none for a moment."""
    newest, previous = list_checkpoints(run / CHECKPOINTS)
    previous.rename(run / "elsewhere")
    newest.rename(newest.with_name(f"tmp-removed-{newest.name}"))
    assert choose_checkpoint(run, "auto", world) == (newest, [])
    (run / "elsewhere").rename(previous)
    previous.rename(previous.with_name(f"tmp-removed-{previous.name}"))  # a removal that was not completed
    assert choose_checkpoint(run, "auto", world) == (newest, [])
    assert not previous.exists()


def test_a_moment_that_the_manifest_does_not_name_is_not_loaded(
    run: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(checkpoints, "restore", lambda engine, masters, moments, scalars: loaded.extend(moments))
    moments = find_checkpoint(run) / "optimizer"
    shutil.copy(moments / "exp_avg.safetensors", moments / "exp_avg (copy).safetensors")
    checkpoints.load_checkpoint(find_checkpoint(run), None, None)  # type: ignore[arg-type]
    assert loaded == ["exp_avg", "exp_avg_sq"]


def test_never_starts_afresh_in_silence(run: Path, world: World, config: Config) -> None:
    for damaged in list_checkpoints(run / "checkpoints"):
        (damaged / "optimizer.json").unlink()
    with pytest.raises(InputError, match=r"no intact checkpoint to resume from .* start with --resume never"):
        train(config, world, run, resume="auto")


def test_storage_that_does_not_answer_is_no_damage(run: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint that can be read is not taken for it: the one that can't would be removed in the end."""
    newest, previous = list_checkpoints(run / CHECKPOINTS)
    real = manifests.digest

    def failing(path: Path) -> dict[str, Any]:
        if unreadable in path.parents:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(manifests, "digest", failing)
    unreadable, number = newest, errno.EIO
    with pytest.raises(InputError, match=rf"{newest}/.* can't be read \(Input/output error\)") as error:
        choose_checkpoint(run, "auto", world)
    assert is_outage(error.value)
    unreadable, number = newest, errno.EACCES  # nor is this damage
    with pytest.raises(InputError, match=rf"Permission denied.* if it is lost, remove {newest}") as error:
        choose_checkpoint(run, "auto", world)
    assert not is_outage(error.value)
    unreadable, number = previous, errno.EIO
    assert choose_checkpoint(run, "auto", world) == (newest, [])
    with pytest.raises(InputError) as error:
        best_so_far(run, newest, replace(read_state(newest), best=Best(8, 1.0, "raw")), TOP1, world)
    assert is_outage(error.value)
    unreadable = newest
    with pytest.raises(InputError) as error:
        open_trained(run)
    assert is_outage(error.value)


def test_a_lost_manifest_is_damage(run: Path, world: World) -> None:
    newest, previous = list_checkpoints(run / "checkpoints")
    (newest / "manifest.json").unlink()
    found, (fault,) = newest_intact(list_checkpoints(run / "checkpoints"), world)
    assert found == previous
    assert fault.startswith(f"{newest}: manifest.json can't be read (")
    with pytest.raises(InputError, match=rf"{newest} is damaged: manifest.json can't be read \("):
        open_trained(run)


def test_lost_checkpoints_are_missed(
    run: Path, world: World, config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that had checkpoints doesn't begin anew without being told to; one that had none yet says that it does."""
    for lost in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(lost)
    with pytest.raises(InputError, match=f"LATEST names step-{STEPS:08d}, which is not there"):
        train(config, world, run, resume="auto")
    shutil.rmtree(run / "checkpoints")
    train(config, world, run, resume="auto")
    assert f"warning: no checkpoint yet: the {STEPS} steps that this run has made" in capfd.readouterr().out


@pytest.mark.parametrize("fails_in", ["save_config", "digest", "_publish"])
def test_a_save_that_fails_raises_an_alarm_and_the_run_goes_on(
    world: World,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fails_in: str,
) -> None:
    """Whatever the phase in which the second of three saves fails, the first stays and the third is made."""
    folder, real, calls = tmp_path / "checkpoints", getattr(checkpoints, fails_in), []

    def failing(*args: object, **kwargs: object) -> object:
        if (folder / "step-00000004").exists() and not calls:
            calls.append(list_checkpoints(folder))
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoints, fails_in, failing)
    train(config, world, tmp_path)
    said = capfd.readouterr().out
    assert "ALARM: after 8 steps " in said
    assert "failed on rank 0: OSError: [Errno 28] No space left on device; the checkpoints before stay" in said
    assert folder / "step-00000004" in calls[0]
    assert list_checkpoints(folder)[0].name == "step-00000011"
    assert newest_intact(list_checkpoints(folder), world) == (list_checkpoints(folder)[0], [])
    assert not list(folder.glob("tmp-*"))


def test_a_last_checkpoint_is_tried_again_until_there_is_room(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("convneur.run.keeper.TRY_SECONDS", 0.0)
    fail_at_the_end(monkeypatch, times=3)
    train(config, world, tmp_path)
    said = capfd.readouterr().out
    assert re.findall(r"ALARM: after 11 steps .* stay; (\d+) more tries", said) == ["9", "8", "7"]
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step-00000011"
    assert (tmp_path / "summary.json").exists()


def test_a_last_checkpoint_that_fails_ends_the_run_as_failed(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convneur.run.keeper.TRY_SECONDS", 0.0)
    fail_at_the_end(monkeypatch, times=LAST_TRIES)
    with pytest.raises(SaveError, match=r"^at the run's end .*No space left.*; mend that, and use --resume auto$"):
        train(config, world, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000008", "step-00000004"]
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-00000008\n"
    assert not (tmp_path / "summary.json").exists()


def fail_at_the_end(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Lets the disk be full so many times when the last step's checkpoint is to be published."""
    real, failures = checkpoints._publish, iter(range(times))

    def failing(temporary: Path, final: Path) -> None:
        if final.name == f"step-{STEPS:08d}" and next(failures, None) is not None:
            raise OSError(28, "No space left on device")
        real(temporary, final)

    monkeypatch.setattr(checkpoints, "_publish", failing)


def test_weights_that_are_not_finite_are_not_saved(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = {"w": torch.tensor([1.0, float("nan")])}
    monkeypatch.setattr(checkpoints, "gather", lambda engine, moment=None: poisoned)
    with pytest.raises(NonFiniteError, match="no longer finite after 4 steps"):
        train(config, world, tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_learning_rate_that_ruins_the_weights_ends_the_run(world: World, config: Config, tmp_path: Path) -> None:
    optimizer = replace(config.optimizer, lr=1e30, clip_grad=0.0)
    diverging = replace(config, optimizer=optimizer, guards=GuardConfig(max_bad_steps=4))
    with pytest.raises(NonFiniteError, match="4 bad steps in a row from step 2 on, and there is no checkpoint"):
        train(diverging, world, tmp_path)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"variant": "n2"}, f"has model.variant = {VARIANT}, the run is configured with n2"),
        ("model", {"placement": "none"}, "has model.placement = per_stage, the run is configured with none"),
        ("data", {"global_batch_size": 64}, "global_batch_size"),
        ("run", {"seed": 1}, "seed"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    trained: Path, world: World, config: Config, tmp_path: Path, section: str, change: dict[str, object], message: str
) -> None:
    other = replace(config, **{section: replace(getattr(config, section), **change)})
    with pytest.raises(InputError, match=message) as error:
        train(other, world, tmp_path / "other", resume=str(trained))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "other").exists()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint in"):
        find_checkpoint(tmp_path)
    with pytest.raises(InputError, match="is not a checkpoint"):
        read_state(tmp_path)


def test_evaluation_of_a_checkpoint_gives_the_run_s_scores(trained: Path, world: World) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    raw = evaluate_checkpoint(trained, world)
    averaged = evaluate_checkpoint(find_checkpoint(trained), world, averaged=True)
    assert (raw.top1, averaged.top1) == (summary["top1"], summary["top1_ema"])
    assert raw.images == 360


def test_evaluation_at_another_resolution(trained: Path, world: World) -> None:
    """Against torchvision's words for it."""
    scores = evaluate_checkpoint(trained, world, image_size=48, crop=0.75)
    config = load_config([trained / "config.yaml"])
    store = open_store(config.data, "val")
    resized = Compose([Resize(64, InterpolationMode.BICUBIC, antialias=True), CenterCrop(48)])
    pixels = [resized(torch.from_numpy(decode(store.read(i).image)).permute(2, 0, 1)) for i in range(len(store))]
    model = ConvNeur(config.model).eval()
    model.load_state_dict(load_weights(find_checkpoint(trained), averaged=False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(normalize(torch.stack(pixels) / 255, config.data.mean, config.data.std)).float()
    labels = torch.from_numpy(store.labels)
    assert scores.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert scores.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-3)
    assert scores.images == 360
    assert scores.loss != evaluate_checkpoint(trained, world, image_size=48).loss


def write_val(digits: Path, folder: Path, classes: dict[str, int]) -> str:
    """The held-out digits whose class is one of `classes`, which are called by their keys, in their order."""
    store = TarStore(digits, "val")
    labels = {digit: label for label, digit in enumerate(classes.values())}
    samples = [sample for sample in map(store.read, range(len(store))) if sample.label in labels]
    relabelled = [sample._replace(label=labels[sample.label]) for sample in samples]
    folder.mkdir()
    split = write_split(folder, "val", relabelled, extension="png", shard_samples=500)
    Manifest("test", tuple(classes), {"val": split}).write(folder)
    return str(folder)


def test_evaluation_tells_classes_by_name(trained: Path, digits: Path, world: World, tmp_path: Path) -> None:
    """In another order, under other names with a map, or some of them only; refused where a class isn't known."""
    assert read_classes(find_checkpoint(trained)) == tuple("0123456789")
    expected = evaluate_checkpoint(trained, world)
    reordered = write_val(
        digits, tmp_path / "reordered", {str(digit): digit for digit in (7, 1, 0, 9, 2, 3, 8, 4, 6, 5)}
    )
    assert replace(evaluate_checkpoint(trained, world, data_root=reordered), loss=expected.loss) == expected

    renamed = write_val(digits, tmp_path / "renamed", {f"a {digit}": digit for digit in range(9, -1, -1)})
    with pytest.raises(InputError, match=r"images of 10 classes \(a 9, a 8, a 7, ...\), but .* --class-map FILE"):
        evaluate_checkpoint(trained, world, data_root=renamed)
    lines = tmp_path / "map"
    lines.write_text("".join(f"a {digit}\t{digit}\n\n" for digit in range(10)))
    mapped = evaluate_checkpoint(trained, world, data_root=renamed, class_map=lines)
    assert replace(mapped, loss=expected.loss) == expected
    lines.write_text("a 9\t9\n")
    with pytest.raises(InputError, match=r"no line for 9 classes \(a 8, a 7, a 6, ...\)"):
        evaluate_checkpoint(trained, world, data_root=renamed, class_map=lines)

    some = write_val(digits, tmp_path / "some", {"8": 8, "3": 3, "5": 5})
    scores = evaluate_checkpoint(trained, world, data_root=some)
    store, config = TarStore(digits, "val"), load_config([trained / "config.yaml"])
    shown = [i for i in range(len(store)) if store.labels[i] in (3, 5, 8)]
    transform = EvalTransform(config.data)
    images = torch.stack([transform(decode(store.read(i).image)) for i in shown])
    model = ConvNeur(config.model).eval()
    model.load_state_dict(load_weights(find_checkpoint(trained), averaged=False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(normalize(images / 255, config.data.mean, config.data.std)).float()
    labels = torch.from_numpy(store.labels[shown])
    assert (scores.images, scores.among) == (len(shown), 3)
    some_differ = 3 / len(shown)  # in bfloat16, other batches
    assert scores.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=some_differ)
    among = torch.tensor([3, 5, 8])[logits[:, [3, 5, 8]].argmax(1)]
    assert scores.top1_among == pytest.approx((among == labels).float().mean().item(), abs=some_differ)
    assert scores.top5_among == 1


def test_an_older_checkpoint_has_the_class_names_of_its_dataset(
    run: Path, digits: Path, world: World, tmp_path: Path
) -> None:
    expected = evaluate_checkpoint(run, world)
    for checkpoint in list_checkpoints(run / CHECKPOINTS):
        (checkpoint / CLASSES_FILE).unlink()
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        del manifest[CLASSES_FILE]
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    reordered = write_val(digits, tmp_path / "reordered", {str(digit): digit for digit in range(9, -1, -1)})
    scores = evaluate_checkpoint(run, world, data_root=reordered)
    assert scores.top1 == expected.top1
    assert f"they are taken from {digits}" in scores.notes[0]
    config = load_config([run / "config.yaml"])
    gone = replace(config, data=replace(config.data, root=str(tmp_path / "gone")))
    assert trained_classes(find_checkpoint(run), config)[0] == tuple("0123456789")
    names, notes = trained_classes(find_checkpoint(run), gone)
    assert names == ()
    assert "labels are taken for their numbers" in notes[0]


def test_a_run_is_not_resumed_with_other_classes(
    run: Path, config: Config, digits: Path, world: World, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(digits, tmp_path / "other"))
    manifest = Manifest.read(other)
    replace(manifest, classes=("zero", *manifest.classes[1:])).write(other)
    longer = replace(config, data=replace(config.data, root=str(other)), schedule=replace(config.schedule, epochs=2))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"trained with '0' as class 0, which is 'zero' in .*other: resume with the dataset"
    ):
        train(longer, world, run, "auto")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"image_size": 16}, "--image-size is 16, expected at least 32"),
        ({"crop": 0.0}, "--crop is 0.0, expected a number above 0 and at most 1"),
    ],
)
def test_an_impossible_resolution_is_refused(trained: Path, world: World, words: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_checkpoint(trained, world, **words)
