"""Images that can't be read: replaced in training, left out and counted in evaluation, and too many end the run."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.multiprocessing.spawn import start_processes

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.inspect.verify import verify_dataset
from convneur.data.stores.tar import TarStore
from convneur.data.stream.batch import Batch
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.on_device import Normalize
from convneur.data.stream.reading import REPLACEMENTS
from convneur.data.stream.train import TrainLoader
from convneur.data.views import transforms
from convneur.data.views.draws import Draws
from convneur.data.views.transforms import TrainTransform
from convneur.monitoring.bad_samples import BadSampleCount
from convneur.tasks.classification import evaluate

SAMPLES, BATCH, STEPS = 41, 8, 8  # 5 steps an epoch


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "png")
    return buffer.getvalue()


BAD = {3: b"no image", 17: b"", 30: png(30)[:45]}


def write_dataset(folder: Path, bad: dict[int, bytes]) -> DataConfig:
    """41 grey squares in 5 shards, each as grey as its number says, the same for both splits."""
    images = [bad.get(number, png(number)) for number in range(SAMPLES)]
    samples = [Sample(f"s{number}", image, number % 3) for number, image in enumerate(images)]
    splits = {name: write_split(folder, name, samples, extension="png", shard_samples=9) for name in ("train", "val")}
    Manifest("test", ("a", "b", "c"), splits).write(folder)
    return DataConfig(
        root=str(folder),
        image_size=8,
        interpolation="bilinear",
        global_batch_size=BATCH,
        lanes=4,
        window=2,
        workers=0,
        eval_batch_size=4,
        eval_crop=1.0,
        augment=AugmentConfig(randaugment="", erase_prob=0, mixup=0, cutmix=0),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return write_dataset(tmp_path_factory.mktemp("bad"), BAD)


def batches(config: DataConfig, world_size: int = 1, accumulation: int = 1, start: int = 0) -> list[list[Batch]]:
    """All micro-batches of each step."""
    store = TarStore(config.root, "train")
    ranks = [
        TrainLoader(config, store, seed=0, rank=rank, world_size=world_size, accumulation=accumulation).iterate(
            start, STEPS
        )
        for rank in range(world_size)
    ]
    return [[batch for micro_batches in step for batch in micro_batches] for step in zip(*ranks, strict=True)]


def joined(steps: list[list[Batch]]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [
        tuple(torch.cat([getattr(batch, name) for batch in step]) for name in ("images", "labels", "indices"))
        for step in steps
    ]


def test_bad_samples_are_replaced_and_named(config: DataConfig, tmp_path: Path) -> None:
    intact = joined(batches(write_dataset(tmp_path, {})))
    steps = batches(config)
    met = set()
    for step, (images, labels, indices), (good_images, _, good_indices) in zip(
        steps, joined(steps), intact, strict=True
    ):
        assert images.shape == good_images.shape
        missing = np.isin(good_indices, list(BAD))
        named = dict(batch for part in step for batch in part.bad)
        assert set(named) >= set(good_indices[missing].tolist())
        met |= set(named)
        for index, reason in named.items():
            assert f"split train, key s{index}: not a readable image (" in reason
            assert "\n" not in reason
            assert " at 0x" not in reason
        assert torch.equal(images[~missing], good_images[~missing])
        assert torch.equal(indices[~missing], good_indices[~missing])
        assert not set(indices.tolist()) & set(BAD)
        assert torch.equal(labels, indices % 3)
        assert torch.equal(images, indices[:, None, None, None].expand_as(images).to(torch.uint8))
    assert met == set(BAD)
    replaced = [
        indices[np.isin(good, list(BAD))].tolist()
        for (_, _, indices), (_, _, good) in zip(joined(steps), intact, strict=True)
    ]
    assert len({index for step in replaced for index in step}) > 2


@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers"), [(2, 1, 0), (4, 1, 0), (2, 2, 0), (1, 4, 0), (1, 1, 2)]
)
def test_replacements_are_the_same_everywhere(
    config: DataConfig, world_size: int, accumulation: int, workers: int
) -> None:
    ours = joined(batches(replace(config, workers=workers), world_size, accumulation))
    for one, other in zip(ours, joined(batches(config)), strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert all(
        torch.equal(one[2], other[2])
        for one, other in zip(joined(batches(config, start=6)), joined(batches(config))[6:], strict=True)
    )


def test_a_loader_collects_what_it_met(config: DataConfig) -> None:
    training = TrainLoader(
        replace(config, workers=2), TarStore(config.root, "train"), seed=0, rank=0, world_size=1, accumulation=1
    )
    steps = list(training.iterate(0, STEPS))
    assert training.bad_samples == {index: reason for (batch,) in steps for index, reason in batch.bad}
    assert set(training.bad_samples) == set(BAD)


def test_damage_on_disk_is_a_bad_sample(tmp_path: Path) -> None:
    config = write_dataset(tmp_path, {})
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"IHDr", 1))
    met = {index: reason for step in batches(config) for batch in step for index, reason in batch.bad}
    assert list(met) == [9]
    assert "train-000001.tar, split train, key s9: checksum mismatch" in met[9]


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("float"), RuntimeError("a\nb"), OSError(5, "x")])
@pytest.mark.parametrize(("owner", "name"), [(transforms, "decode"), (TrainTransform, "show"), (Draws, "draw")])
def test_whatever_a_sample_raises_is_that_samples_fault(
    config: DataConfig, owner: object, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced, named in one line, and the rest of the stream unchanged."""
    expected = joined(batches(config))
    real, calls = getattr(owner, name), []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 5:
            raise error
        return real(*arguments)

    monkeypatch.setattr(owner, name, failing)
    steps = batches(config)
    named = [bad for step in steps for batch in step for bad in batch.bad if bad.number not in BAD]
    assert len(named) == 1
    assert "not a readable image (" in named[0].reason
    assert "\n" not in named[0].reason
    different = sum(int((ours[2] != theirs[2]).sum()) for ours, theirs in zip(joined(steps), expected, strict=True))
    assert different == 1


def test_verifying_and_training_agree_on_what_is_intact(tmp_path: Path) -> None:
    tiny, bomb = io.BytesIO(), io.BytesIO()
    Image.new("L", (1, 1), 7).save(tiny, "png")
    Image.new("1", (20000, 20000)).save(bomb, "png")
    config = write_dataset(tmp_path, BAD | {5: tiny.getvalue(), 9: bomb.getvalue()})
    met = {index for step in batches(config) for batch in step for index, _ in batch.bad}
    found = {denied.row for denied in verify_dataset(tmp_path, processes=1)[0].denied}
    assert met == found == {*BAD, 9}


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_ends_in_one_line(tmp_path: Path, workers: int) -> None:
    config = replace(write_dataset(tmp_path, dict.fromkeys(range(SAMPLES), b"x")), workers=workers)
    with pytest.raises(InputError, match=rf"^.*not a readable image.*the {REPLACEMENTS - 1} drawn before.*$"):
        batches(config)


@pytest.mark.parametrize("workers", [0, 1])
def test_failing_storage_is_retried_and_ends_in_one_line(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that vanishes while the run goes on is not skipped: that would change the order."""
    monkeypatch.setattr("convneur.data.stores.retry.DELAYS", (0.01, 0.01))
    config = replace(write_dataset(tmp_path, {}), workers=workers)
    stores = {split: TarStore(tmp_path, split) for split in ("train", "val")}
    loaders: dict[str, Callable[[], object]] = {
        "train": lambda: list(
            TrainLoader(config, stores["train"], seed=0, rank=0, world_size=1, accumulation=1).iterate(0, 5)
        ),
        "val": lambda: list(EvalLoader(config, stores["val"], rank=0, world_size=1)),
    }
    for split, load in loaders.items():
        (tmp_path / f"{split}-000002.tar").unlink()
        with pytest.raises(
            InputError, match=rf"^.*{split}-000002.tar can't be read \(No such file.*and 3 attempts.*$"
        ) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_storage_that_recovers_goes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_dataset(tmp_path, {})
    expected = joined(batches(config))
    shard, away = tmp_path / "train-000002.tar", tmp_path / "away"
    store = TarStore(tmp_path, "train")
    shard.rename(away)
    monkeypatch.setattr(
        "convneur.data.stores.retry.time.sleep", lambda _: away.rename(shard) if away.exists() else None
    )
    training = TrainLoader(config, store, seed=0, rank=0, world_size=1, accumulation=1)
    for (batch,), (images, _, _) in zip(training.iterate(0, STEPS), expected, strict=True):
        assert torch.equal(batch.images, images)
    assert shard.exists()
    assert not training.bad_samples


@pytest.mark.parametrize("world_size", range(1, 10))
def test_evaluation_counts_valid_and_bad(config: DataConfig, world_size: int) -> None:
    store = TarStore(config.root, "val")
    shown, bad = [], []
    for rank in range(world_size):
        for batch in EvalLoader(config, store, rank=rank, world_size=world_size):
            assert batch.images.shape == (4, 3, 8, 8)
            shown += batch.images[batch.mask][:, 0, 0, 0].tolist()
            bad += [index for index, _ in batch.bad]
    assert sorted(bad) == sorted(BAD)
    assert sorted(shown + bad) == list(range(SAMPLES))


def in_ranks(function: Callable[..., None], *arguments: object) -> None:
    """Runs a function of (rank, *arguments) in two gloo processes: not forked ones, which a group here would go to."""
    server()
    start_processes(function, args=arguments, nprocs=2, start_method="forkserver")


def _join(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)


def _count(rank: int, meeting: str, config: DataConfig) -> None:
    _join(rank, meeting)
    found: dict[int, str] = {}
    count = BadSampleCount(replace(config, bad_limit=3), SAMPLES, found, torch.device("cpu"))
    assert count.update() == []
    found |= [{5: "five", 2: "two"}, {5: "five"}][rank]
    assert count.update() == ["two", "five"]
    assert count.update() == []
    found |= [{}, {1: "one", 2: "two"}][rank]
    assert count.update() == ["one"]
    count.check()
    found |= [{9: "nine"}, {}][rank]
    assert count.update() == ["nine"]
    with pytest.raises(
        InputError, match=r"^4 training samples can't be read, and data.bad_limit 3 allows 3: one \| two"
    ):
        count.check()
    fraction = BadSampleCount(replace(config, bad_limit=0.1), SAMPLES, found, torch.device("cpu"))
    fraction.update()
    fraction.check()  # 4 of 41 are less than a tenth
    dist.destroy_process_group()


def test_ranks_add_up_and_stop_together(config: DataConfig, tmp_path: Path) -> None:
    in_ranks(_count, str(tmp_path / "meeting"), config)


class _Grey(nn.Module):
    """Tells the grey squares' classes without a mistake."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].round().long() % 3, 3).float()


class _Broken(_Grey):
    """The same, but one of the logits of images 5 and 12 isn't finite; 12 is of class 0, which a NaN would win for."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        logits[(images[:, 0, 0, 0].round() == 5) | (images[:, 0, 0, 0].round() == 12), 0] = self.value
        return logits


def _evaluate(rank: int, meeting: str, config: DataConfig) -> None:
    _join(rank, meeting)
    config = replace(config, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    loader = EvalLoader(config, TarStore(config.root, "val"), rank=rank, world_size=2)
    normalize = Normalize(config, torch.device("cpu"))
    scores = evaluate(_Grey(), loader, normalize, torch.autocast("cpu", enabled=False), SAMPLES)
    assert (scores.top1, scores.images) == (1, SAMPLES - len(BAD))
    assert len(scores.bad) == len(BAD)
    assert all("val-00000" in line for line in scores.bad)
    with pytest.raises(RuntimeError, match="saw 38 images and 3 bad ones, expected each of 40 once"):
        evaluate(_Grey(), loader, normalize, torch.autocast("cpu", enabled=False), SAMPLES - 1)
    for value in (float("nan"), float("inf")):
        broken = _Broken(value)
        broken_scores = evaluate(
            broken, loader, normalize, torch.autocast("cpu", enabled=False), SAMPLES, torch.arange(2)
        )
        assert broken_scores.not_finite == 2
        assert broken_scores.top1 == broken_scores.top5 == (SAMPLES - len(BAD) - 2) / (SAMPLES - len(BAD))
        assert broken_scores.top1_among == pytest.approx(25 / 38)
        assert broken_scores.loss == pytest.approx(scores.loss)
        assert broken_scores.warnings[-1].startswith(
            "the logits of 2 of 38 images aren't finite: they count as answered w"
        )
    assert len(scores.warnings) == len(BAD)
    dist.destroy_process_group()


def test_scores_leave_bad_images_out_and_say_so(config: DataConfig, tmp_path: Path) -> None:
    in_ranks(_evaluate, str(tmp_path / "meeting"), config)


def test_a_run_with_too_many_bad_samples_stops_with_the_list(tmp_path: Path) -> None:
    """The command line, two processes: status 2, one line of error, and each sample named."""
    (tmp_path / "data").mkdir()
    config = write_dataset(tmp_path / "data", BAD)
    settings = {
        "run.root": tmp_path / "runs",
        "run.name": "bad",
        "run.log_every_steps": 5,
        "model.variant": "n1",
        "model.num_classes": 3,
        "data.root": config.root,
        "data.image_size": 32,
        "data.global_batch_size": BATCH,
        "data.lanes": 4,
        "data.workers": 1,
        "data.bad_limit": 2,
        "schedule.epochs": 50,
        "schedule.warmup_epochs": 1,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, "-m", "convneur.launch", "train", "--launch", "local", "--nproc", "2", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("convneur: error:")]
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-2000:]
    assert len(errors) == 1
    assert "3 training samples can't be read, and data.bad_limit 2 allows 2" in errors[0]
    for index in BAD:
        assert f"key s{index}: not a readable image" in errors[0]
        assert f"key s{index}: not a readable image" in result.stdout


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bad=st.sets(st.integers(0, SAMPLES - 1), max_size=12), world_size=st.sampled_from([1, 2, 4]))
def test_any_set_of_bad_samples(tmp_path_factory: pytest.TempPathFactory, bad: set[int], world_size: int) -> None:
    config = write_dataset(tmp_path_factory.mktemp("any"), dict.fromkeys(bad, b"x"))
    store = TarStore(config.root, "train")
    first: list[int] = []
    for ranks in (1, world_size):
        steps = joined(batches(config, ranks))
        indices = torch.cat([step[2] for step in steps]).tolist()
        assert not set(indices) & bad
        assert len(indices) == STEPS * BATCH
        assert [store.read(index).label for index in indices] == torch.cat([step[1] for step in steps]).tolist()
        assert indices == (first or indices)
        first = indices
