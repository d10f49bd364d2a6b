"""The stream of batches: the same for every number of ranks, micro-batches and workers, and from any step on."""

import io
import json
import multiprocessing
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError, WorkerError
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.keys import libraries_restored, seed_libraries, view_key
from convneur.data.prepare.synthetic import prepare_synthetic
from convneur.data.stores.tar import TarStore
from convneur.data.stream.batch import EvalBatch
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.train import TrainLoader
from convneur.data.views.decode import decode
from convneur.data.views.transforms import EvalTransform, TrainTransform
from convneur.tasks.mixing import DeviceTransform

STEPS_PER_EPOCH = 22  # 1,437 samples in batches of 64
STOP = 33  # one and a half epochs


@pytest.fixture(scope="module")
def config(digits: Path) -> DataConfig:
    return DataConfig(
        root=str(digits),
        image_size=16,
        global_batch_size=64,
        lanes=8,
        window=2,
        workers=0,
        eval_batch_size=50,
        augment=AugmentConfig(erase_prob=0.25, mixup=0.8, cutmix=1.0, color_jitter=0.4),
    )


Stream = list[tuple[torch.Tensor, ...]]


def stream(
    config: DataConfig, start: int = 0, stop: int = STOP, *, world_size: int = 1, accumulation: int = 1, seed: int = 0
) -> Stream:
    """What all ranks see together at each step: numbers, labels, pixels, the model's inputs and its targets."""
    store = TarStore(config.root, config.train_split)
    transform = DeviceTransform(config, 10, label_smoothing=0.1, seed=seed, device=torch.device("cpu"))
    ranks = [
        TrainLoader(config, store, seed=seed, rank=rank, world_size=world_size, accumulation=accumulation).iterate(
            start, stop
        )
        for rank in range(world_size)
    ]
    steps = []
    for step, per_rank in enumerate(zip(*ranks, strict=True), start):
        batches = [batch for micro_batches in per_rank for batch in micro_batches]
        assert [len(micro_batches) for micro_batches in per_rank] == [accumulation] * world_size
        assert [lane for batch in batches for lane in batch.lanes] == list(range(config.lanes))
        assert {(batch.step, batch.epoch) for batch in batches} == {(step, step // STEPS_PER_EPOCH)}
        parts = [(batch.indices, batch.labels, batch.images, *transform(batch)) for batch in batches]
        steps.append(tuple(torch.cat(part) for part in zip(*parts, strict=True)))
    return steps


def assert_equal(ours: Stream, expected: Stream) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def reference(config: DataConfig) -> Stream:
    return stream(config)


def test_epochs_show_real_samples_once_with_their_labels(config: DataConfig, reference: Stream) -> None:
    labels = TarStore(config.root, "train").labels
    assert len(reference) == STOP
    for epoch in (reference[:STEPS_PER_EPOCH], reference[STEPS_PER_EPOCH:]):
        seen = torch.cat([step[0] for step in epoch])
        assert len(seen.unique()) == len(seen) == 64 * len(epoch)
        assert np.array_equal(labels[seen], torch.cat([step[1] for step in epoch]))
    _, _, pixels, inputs, targets = reference[0]
    assert (pixels.shape, pixels.dtype) == ((64, 3, 16, 16), torch.uint8)
    assert (inputs.shape, inputs.dtype) == ((64, 3, 16, 16), torch.float32)
    assert (targets.shape, targets.dtype) == ((64, 10), torch.float32)


def test_augmentation_differs_from_epoch_to_epoch(reference: Stream) -> None:
    indices, _, pixels, _, _ = (torch.cat(part) for part in zip(*reference, strict=True))
    first, second = {}, {}
    for position, index in enumerate(indices.tolist()):
        (first if position < STEPS_PER_EPOCH * 64 else second)[index] = pixels[position]
    both = first.keys() & second.keys()
    assert len(both) > 600
    assert sum(torch.equal(first[index], second[index]) for index in both) < 0.05 * len(both)


@pytest.mark.parametrize(
    ("world_size", "accumulation", "workers"),
    [(2, 1, 0), (4, 1, 0), (8, 1, 0), (1, 2, 0), (2, 4, 0), (1, 1, 1), (1, 1, 3), (2, 2, 1)],
)
def test_stream_is_the_same_for_ranks_micro_batches_and_workers(
    config: DataConfig, reference: Stream, world_size: int, accumulation: int, workers: int
) -> None:
    ours = stream(replace(config, workers=workers), world_size=world_size, accumulation=accumulation)
    assert_equal(ours, reference)


@pytest.mark.parametrize("start", [1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(config: DataConfig, reference: Stream, start: int) -> None:
    assert_equal(stream(config, start, start + 5, world_size=4), reference[start : start + 5])


def test_blocks_keep_the_stream_on_any_number_of_ranks_and_at_any_start(config: DataConfig, reference: Stream) -> None:
    config = replace(config, block=3)
    expected = stream(config, 0, STEPS_PER_EPOCH + 3)
    assert not torch.equal(expected[0][0], reference[0][0])
    assert_equal(stream(config, STEPS_PER_EPOCH - 2, STEPS_PER_EPOCH + 3, world_size=4), expected[-5:])
    assert_equal(stream(config, 7, 9, world_size=2, accumulation=4), expected[7:9])


def test_a_state_from_before_there_were_blocks_is_one_without_them(config: DataConfig) -> None:
    store = TarStore(config.root, "train")
    whole, blocks = (
        TrainLoader(replace(config, block=block), store, seed=0, rank=0, world_size=1, accumulation=1)
        for block in (0, 8)
    )
    old = {name: value for name, value in whole.state(30).items() if name != "block"}
    whole.check_state(old)
    for saved, there, here in ((old, blocks, 8), (blocks.state(30), whole, 0)):
        with pytest.raises(InputError, match=rf"has block {8 - here}, this run {here}"):
            there.check_state(saved)


def test_a_stop_and_a_resume_lose_nothing(config: DataConfig, reference: Stream) -> None:
    loader = TrainLoader(
        replace(config, workers=2), TarStore(config.root, "train"), seed=0, rank=0, world_size=1, accumulation=1
    )
    others = set(multiprocessing.active_children())
    before = loader.iterate(0, STOP)
    seen = [next(before)[0].indices for _ in range(20)]
    before.close()
    assert not set(multiprocessing.active_children()) - others
    seen += [batch.indices for (batch,) in loader.iterate(20, STOP)]
    assert all(torch.equal(ours, step[0]) for ours, step in zip(seen, reference, strict=True))


def test_one_set_of_workers_serves_all_epochs(config: DataConfig) -> None:
    loader = TrainLoader(
        replace(config, workers=2), TarStore(config.root, "train"), seed=0, rank=0, world_size=8, accumulation=1
    )
    workers = set()
    others = set(multiprocessing.active_children())
    for _ in loader.iterate(0, 2 * STEPS_PER_EPOCH + 1):
        workers |= {child.pid for child in multiprocessing.active_children() if child not in others}
    assert len(workers) == 2


def test_a_late_step_starts_as_fast_as_the_first(config: DataConfig) -> None:
    loader = TrainLoader(config, TarStore(config.root, "train"), seed=0, rank=0, world_size=1, accumulation=1)
    (batch,) = next(loader.iterate(10**9, 10**9 + 1))
    assert batch.epoch == 10**9 // STEPS_PER_EPOCH


def test_seeds_give_different_streams(config: DataConfig, reference: Stream) -> None:
    (other,) = stream(config, 0, 1, seed=1)
    assert not torch.equal(other[0], reference[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_generators_of_the_process_alone(config: DataConfig, workers: int) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = draws()
    seed()
    stream(replace(config, workers=workers), 0, 2)
    list(EvalLoader(replace(config, workers=workers), TarStore(config.root, "val"), rank=0, world_size=1))
    assert draws() == expected


def test_state_describes_the_stream_and_not_the_ranks(config: DataConfig) -> None:
    store = TarStore(config.root, "train")
    loaders = [
        TrainLoader(config, store, seed=3, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank, world_size, accumulation in [(0, 1, 1), (1, 2, 1), (3, 4, 2)]
    ]
    states = [loader.state(50) for loader in loaders]
    assert (
        states[0]
        == states[1]
        == states[2]
        == {
            "format": 1,
            "seed": 3,
            "epoch": 2,
            "step": 50,
            "global_batch_size": 64,
            "lanes": 8,
            "window": 2,
            "block": 0,
            "repeats": 1,
            "engine": "webdataset",
            "decode": "cpu",
            "index_hash": store.index_hash,
        }
    )
    for loader in loaders:
        loader.check_state(json.loads(json.dumps(states[0])))


@pytest.mark.parametrize("name", ["format", "seed", "epoch", "global_batch_size", "lanes", "window", "index_hash"])
def test_a_state_of_another_stream_is_refused(config: DataConfig, name: str) -> None:
    loader = TrainLoader(config, TarStore(config.root, "train"), seed=0, rank=0, world_size=1, accumulation=1)
    for saved in (
        loader.state(30) | {name: 77},
        {key: value for key, value in loader.state(30).items() if key != name},
    ):
        with pytest.raises(InputError, match=rf"^the checkpoint's data stream has {name} .*$"):
            loader.check_state(saved)


@pytest.mark.parametrize("world_size", range(1, 10))
def test_evaluation_shows_every_sample_once(config: DataConfig, world_size: int) -> None:
    store = TarStore(config.root, "val")
    config = replace(config, eval_batch_size=17)
    loaders = [EvalLoader(config, store, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    transform = EvalTransform(config)
    shown = []
    for rank, loader in enumerate(loaders):
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.images.shape == (17, 3, 16, 16)
            assert not batch.images[~batch.mask].any()
            assert not batch.labels[~batch.mask].any()
        images, labels = (torch.cat([part[batch.mask] for batch, part in pick(batches, name)]) for name in range(2))
        numbers = range(rank, len(store), world_size)
        assert len(images) == len(numbers)
        for number, image, label in zip(numbers, images, labels, strict=True):
            sample = store.read(number)
            assert label == sample.label
            assert torch.equal(image, transform(Image.open(io.BytesIO(sample.image)).convert("RGB")))
        shown += numbers
    assert sorted(shown) == list(range(len(store)))


def pick(batches: list[EvalBatch], part: int) -> list[tuple[EvalBatch, torch.Tensor]]:
    return [(batch, batch[part]) for batch in batches]


def test_more_ranks_than_samples_still_agree_on_the_batches(tmp_path: Path, config: DataConfig) -> None:
    write_dataset(tmp_path, [png(0)] * 3)
    config = replace(config, root=str(tmp_path), eval_batch_size=2)
    loaders = [EvalLoader(config, TarStore(tmp_path, "train"), rank=rank, world_size=5) for rank in range(5)]
    assert [sum(int(batch.mask.sum()) for batch in loader) for loader in loaders] == [1, 1, 1, 0, 0]
    assert [len(loader) for loader in loaders] == [1] * 5


def test_evaluation_with_workers_can_be_repeated(config: DataConfig) -> None:
    store = TarStore(config.root, "val")
    expected = list(EvalLoader(config, store, rank=1, world_size=2))
    loader = EvalLoader(replace(config, workers=2), store, rank=1, world_size=2)
    for _ in range(2):
        for ours, batch in zip(loader, expected, strict=True):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours[:3], batch[:3], strict=True))


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "png")
    return buffer.getvalue()


def write_dataset(folder: Path, images: list[bytes]) -> None:
    samples = [Sample(f"s{number}", image, 0) for number, image in enumerate(images)]
    split = write_split(folder, "train", samples, extension="png", shard_samples=4)
    Manifest("test", ("only",), {"train": split}).write(folder)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", [AugmentConfig(randaugment="", vflip=0.5), AugmentConfig()])
def test_every_view_is_that_of_its_sample_decoded_and_augmented_alone(
    tmp_path: Path, augment: AugmentConfig, workers: int
) -> None:
    """Whatever workers read ahead, and also for batches that the training process keeps."""
    prepare_synthetic(tmp_path / "data", classes=3, images=200, height=40, width=50, processes=1, shard_samples=50)
    config = DataConfig(
        root=str(tmp_path / "data"),
        image_size=16,
        global_batch_size=40,
        lanes=2,
        repeats=2,
        workers=workers,
        augment=replace(augment, mixup=0, cutmix=0),
    )
    store, transform = TarStore(config.root, "train"), TrainTransform(config)
    loader = TrainLoader(config, store, seed=3, rank=0, world_size=1, accumulation=1)
    kept = [batch for (batch,) in loader.iterate(0, 15)]
    for batch in kept:
        views = zip(batch.images, batch.labels, batch.indices.tolist(), batch.repetitions.tolist(), strict=True)
        for image, label, index, repetition in views:
            sample = store.read(index)
            with libraries_restored():
                seed_libraries(view_key(3, "augment", batch.epoch, index, repetition))
                expected = transform(decode(sample.image))
            assert torch.equal(image, expected)
            assert label == sample.label


def test_a_worker_that_is_killed_is_named(config: DataConfig) -> None:
    """Where its batch is waited for, and not in the middle of whatever else the process does."""
    loader = EvalLoader(
        replace(config, workers=2, eval_batch_size=1), TarStore(config.root, "val"), rank=0, world_size=1
    )
    others = multiprocessing.active_children()  # of tests before this one
    batches = iter(loader)
    next(batches)
    worker = next(child for child in multiprocessing.active_children() if child not in others)
    worker.kill()
    worker.join()
    with pytest.raises(WorkerError, match=f"decoding process {worker.pid} was killed by SIGKILL"):
        list(batches)


def test_what_workers_evaluate_takes_no_shared_memory(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have little of it, and a worker that finds none leaves its reader waiting for ever."""

    def full(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    loader = EvalLoader(replace(config, workers=1), TarStore(config.root, "val"), rank=0, world_size=1)
    assert sum(int(batch.mask.sum()) for batch in loader) == len(TarStore(config.root, "val"))
