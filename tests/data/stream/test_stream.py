"""The stream as a whole: its draws, any sequence of stops and resumes, repeats, memory, and how its processes end."""

import io
import subprocess
import sys
import tracemalloc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.keys import key, view_key
from convneur.data.stores.tar import TarStore
from convneur.data.stream.batch import Batch
from convneur.data.stream.train import TrainLoader
from convneur.data.views.transforms import RESIZES
from convneur.tasks.mixing import DeviceTransform

SAMPLES, BATCH, STEPS_PER_EPOCH = 130, 24, 5
STOP = 8  # one and a half epochs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """130 JPEGs in 14 shards, and all that can be drawn."""
    folder = tmp_path_factory.mktemp("stream")
    noise = np.random.default_rng(0)
    samples = []
    for number in range(SAMPLES):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(256, size=(40, 30 + number % 7, 3), dtype=np.uint8)).save(buffer, "jpeg")
        samples.append(Sample(f"s{number}", buffer.getvalue(), number % 10))
    split = write_split(folder, "train", samples, extension="jpg", shard_samples=10)
    Manifest("test", tuple("0123456789"), {"train": split}).write(folder)
    return DataConfig(
        root=str(folder),
        image_size=16,
        global_batch_size=BATCH,
        lanes=4,
        window=2,
        workers=0,
        augment=AugmentConfig(vflip=0.3),
    )


def batches(config: DataConfig, start: int = 0, stop: int = STOP, world_size: int = 1) -> list[list[Batch]]:
    """What each rank reads at each step."""
    store = TarStore(config.root, "train")
    ranks = [
        TrainLoader(config, store, seed=0, rank=rank, world_size=world_size, accumulation=1)
        for rank in range(world_size)
    ]
    steps = zip(*(loader.iterate(start, stop) for loader in ranks), strict=True)
    return [[batch for micro_batches in step for batch in micro_batches] for step in steps]


def shown(steps: list[list[Batch]]) -> list[tuple[int, int, int]]:
    """Number, repetition and pixels' hash of every image."""
    return [
        (index, repetition, hash(image.numpy().tobytes()))
        for step in steps
        for batch in step
        for index, repetition, image in zip(
            batch.indices.tolist(), batch.repetitions.tolist(), batch.images, strict=True
        )
    ]


Crops = list[tuple[int, ...]]


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> Crops:
    """The crops that are drawn from here on."""
    drawn: Crops = []
    draw = RandomResizedCropAndInterpolation.get_params

    def note(*args: object) -> tuple[int, ...]:
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(RandomResizedCropAndInterpolation, "get_params", staticmethod(note))
    return drawn


def lambdas(config: DataConfig, steps: list[list[Batch]]) -> list[float]:
    """What is left of each image's own label after mixing."""
    transform = DeviceTransform(config, 10, label_smoothing=0, seed=0, device=torch.device("cpu"))
    return [
        share
        for step in steps
        for batch in step
        for share in transform(batch)[1].gather(1, batch.labels[:, None]).ravel().tolist()
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_crops_and_lambdas_do_not_depend_on_the_ranks(config: DataConfig, crops: Crops, world_size: int) -> None:
    expected = batches(config)
    expected_crops = crops[:]
    crops.clear()
    ours = batches(config, world_size=world_size)
    assert shown(ours) == shown(expected)
    assert crops == expected_crops
    assert len(set(crops)) > 0.9 * len(crops) == 0.9 * STOP * BATCH
    assert lambdas(config, ours) == lambdas(config, expected)
    assert len(set(lambdas(config, ours))) > STOP


def test_crops_do_not_depend_on_the_interpolation(config: DataConfig, crops: Crops) -> None:
    drawn, pixels = [], []
    for interpolation in RESIZES:
        crops.clear()
        steps = batches(replace(config, interpolation=interpolation), stop=1)
        drawn.append(crops[:])
        pixels.append(steps[0][0].images)
    assert all(one == drawn[0] for one in drawn)
    # The same crop, flips and RandAugment, so the images are alike; others differ by 80 grey levels on average.
    assert all((one.float() - pixels[0].float()).abs().mean() < 12 for one in pixels)
    assert all(not torch.equal(one, pixels[0]) for one in pixels[1:])


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 4)), max_size=6), st.sampled_from([1, 3]))
def test_any_stops_and_resumes_on_any_ranks_join_to_one_stream(
    config: DataConfig, legs: list[tuple[int, int]], repeats: int
) -> None:
    """Each leg runs some steps, has read one more that a kill took away, and another number of ranks goes on."""
    config = replace(config, repeats=repeats, augment=AugmentConfig(randaugment=""))
    joined: list[tuple[int, int, int]] = []
    step = 0
    for world_size, length in legs:
        joined += shown(batches(config, step, step + length + 1, world_size)[:length])
        step += length
    joined += shown(batches(config, step, step + 2))
    assert joined == shown(batches(config, 0, step + 2))
    for epoch in range((step + 2) // STEPS_PER_EPOCH):
        views = joined[epoch * STEPS_PER_EPOCH * BATCH : (epoch + 1) * STEPS_PER_EPOCH * BATCH]
        assert len({view[:2] for view in views}) == STEPS_PER_EPOCH * BATCH


def test_repeated_samples_are_augmented_and_erased_anew(config: DataConfig) -> None:
    config = replace(config, repeats=3, augment=AugmentConfig(mixup=0, cutmix=0, erase_prob=1))
    epoch = batches(config, stop=STEPS_PER_EPOCH)
    views = shown(epoch)
    assert Counter(Counter(index for index, _, _ in views).values()) == {3: STEPS_PER_EPOCH * BATCH // 3}
    assert {repetition for _, repetition, _ in views} == {0, 1, 2}
    assert len({pixels for *_, pixels in views}) > 0.97 * len(views)
    # The same pixels under two repetitions are erased at different places.
    (batch,) = epoch[0]
    transform = DeviceTransform(config, 10, label_smoothing=0, seed=0, device=torch.device("cpu"))
    inputs = [transform(replace(batch, repetitions=torch.full((BATCH,), number)))[0] for number in (0, 1, 0)]
    assert torch.equal(inputs[0], inputs[2])
    assert all(not torch.equal(one, other) for one, other in zip(*inputs[:2], strict=True))


def test_without_repeats_the_stream_is_that_of_the_first_showings(config: DataConfig) -> None:
    once = {index: pixels for index, _, pixels in shown(batches(config, stop=STEPS_PER_EPOCH))}
    thrice = shown(batches(replace(config, repeats=3), stop=STEPS_PER_EPOCH))
    firsts = {index: pixels for index, repetition, pixels in thrice if repetition == 0}
    both = once.keys() & firsts.keys()
    assert len(both) > 20
    assert all(once[index] == firsts[index] for index in both)


def test_memory_stays_flat_over_epochs_of_many_shards(digits: Path, tmp_path: Path) -> None:
    store = TarStore(digits, "train")
    split = write_split(
        tmp_path, "train", (store.read(number) for number in range(600)), extension="png", shard_samples=2
    )
    Manifest("test", store.classes, {"train": split}).write(tmp_path)
    config = DataConfig(
        root=str(tmp_path),
        image_size=64,  # 12 kB an image: 22 MB in three epochs, if they were kept
        global_batch_size=60,
        lanes=4,
        workers=0,
        augment=AugmentConfig(randaugment=""),
    )
    loader = TrainLoader(config, TarStore(tmp_path, "train"), seed=0, rank=0, world_size=1, accumulation=1)
    # What Python, NumPy and PyTorch hold, not what the process has: that is up to the machine's allocator.
    tracemalloc.start()
    try:
        held, images = [], []
        for step, micro_batches in enumerate(loader.iterate(0, 50)):
            images += [weakref.ref(batch.images) for batch in micro_batches]
            if step % 10 == 9:
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[1] < 10e6
    assert sum(tensor() is not None for tensor in images) <= 2


def test_an_error_ends_the_process_and_its_workers(config: DataConfig) -> None:
    """The traceback keeps the iterator alive until the interpreter ends, which waits for what ignores TERM."""
    script = f"""
from convneur.data.config import DataConfig
from convneur.data.stream.train import TrainLoader
from convneur.data.stores.tar import TarStore

config = DataConfig(root={config.root!r}, image_size=16, global_batch_size={BATCH}, lanes=4, workers=2)
loader = TrainLoader(config, TarStore(config.root, "train"), seed=0, rank=0, world_size=1, accumulation=1)
def train():
    steps = loader.iterate(0, 1000)
    next(steps)
    raise RuntimeError("a fault in the step")
train()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1200)
    assert run.returncode == 1
    assert run.stderr.endswith("RuntimeError: a fault in the step\n")


def test_keys_of_first_showings_are_those_without_repeats() -> None:
    assert view_key(1, "augment", 2, 3, 0) == key(1, "augment", 2, 3)
    assert len({view_key(1, "augment", 2, 3, number) for number in range(10)}) == 10
