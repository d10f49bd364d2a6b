"""The stream through FFCV's own loader: the same for ranks, threads and any start, wary of damage; and whole runs."""

import io
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from compared_runs import assert_same_files, newest
from forked import run_ranks
from PIL import Image
from places import RANKS
from small_run import BATCH
from small_run import STEPS as STEPS_A_RUN

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.keys import key
from convneur.data.prepare.betons import add_betons
from convneur.data.prepare.digits import prepare_digits
from convneur.data.prepare.synthetic import SyntheticImages
from convneur.data.stores.beton import BetonStore
from convneur.data.stores.choose import open_store
from convneur.data.stream.batch import Batch
from convneur.data.stream.choose import build_train_loader
from convneur.data.stream.reading import REPLACEMENTS
from convneur.data.stream.train import TrainLoader
from convneur.data.views.decode import decode
from convneur.records.metrics import read_metrics
from convneur.system.world import World
from convneur.tools.evaluate import evaluate_checkpoint

pytestmark = pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV, WHICH IS OPTIONAL, IS NOT INSTALLED HERE")

SAMPLES, LABELS = 70, 3
STEPS, STOP = 4, 7  # 70 samples in batches of 16: 4 steps an epoch, of which 7 are more than one and a half
SIZE, SEED = 24, 5
PNG, CMYK = 11, 12


def images() -> list[bytes]:
    """Photographs, upright and lying, and two that FFCV's decoder doesn't take."""
    photos = [SyntheticImages("ffcv", SAMPLES, LABELS, *((60, 80), (70, 50))[n % 2])[n].image for n in range(SAMPLES)]
    for number, mode, kind in ((PNG, "RGB", "png"), (CMYK, "CMYK", "jpeg")):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(photos[number])).convert(mode).save(buffer, kind)
        photos[number] = buffer.getvalue()
    return photos


def write_dataset(folder: Path, images: list[bytes]) -> DataConfig:
    samples = [Sample(f"s{number}", image, number % LABELS) for number, image in enumerate(images)]
    split = write_split(folder, "train", samples, extension="jpg", shard_samples=16)
    Manifest("test", tuple("abc"), {"train": split}).write(folder)
    add_betons(folder, "both", "jpg", processes=1)
    return DataConfig(
        root=str(folder),
        engine="ffcv",
        image_size=SIZE,
        interpolation="area",
        global_batch_size=16,
        lanes=8,
        window=2,
        workers=1,
        augment=AugmentConfig(randaugment="", vflip=0.3),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return write_dataset(tmp_path_factory.mktemp("ffcv"), images())


def other_engine(config: DataConfig) -> DataConfig:
    return replace(config, engine="webdataset", format="ffcv")


Stream = list[tuple[torch.Tensor, ...]]


def loaders(config: DataConfig, world_size: int = 1, accumulation: int = 1) -> list[TrainLoader]:
    store = open_store(config, "train")
    return [
        build_train_loader(config, store, seed=SEED, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]


def read(ranks: list[TrainLoader], start: int = 0, stop: int = STOP) -> Iterator[list[Batch]]:
    """All micro-batches of each step; ranks take turns, as numba's threads serve one loader of a process at a time."""
    per_rank = [list(rank.iterate(start, stop)) for rank in ranks]
    return ([batch for micro_batches in step for batch in micro_batches] for step in zip(*per_rank, strict=True))


def joined(steps: Iterator[list[Batch]]) -> Stream:
    names = ("images", "labels", "indices", "repetitions")
    return [tuple(torch.cat([getattr(batch, name) for batch in step]) for name in names) for step in steps]


def assert_equal(ours: Stream, expected: Stream) -> None:
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def loader(config: DataConfig) -> TrainLoader:
    """One for most tests: each compiles code of its own."""
    return loaders(config)[0]


@pytest.fixture(scope="module")
def reference(loader: TrainLoader) -> Stream:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    stream = joined(read([loader]))
    assert torch.get_num_threads() == threads + 1  # FFCV sets it to its own
    torch.set_num_threads(threads)
    return stream


def test_samples_and_labels_are_those_of_the_other_engine(config: DataConfig, reference: Stream) -> None:
    other = joined(read(loaders(other_engine(config))))
    for ours, theirs in zip(reference, other, strict=True):
        assert (ours[0].shape, ours[0].dtype) == ((16, 3, SIZE, SIZE), torch.uint8)
        assert ours[0].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(mine, their) for mine, their in zip(ours[1:], theirs[1:], strict=True))
        assert torch.equal(ours[1], ours[2] % LABELS)
    for epoch in (reference[:STEPS], reference[STEPS:]):
        assert max(Counter(torch.cat([step[2] for step in epoch]).tolist()).values()) == 1


@pytest.mark.parametrize(("world_size", "accumulation", "workers"), [(1, 1, 2), (2, 1, 1), (4, 1, 1), (2, 2, 1)])
def test_stream_is_the_same_for_ranks_micro_batches_and_threads(
    config: DataConfig, reference: Stream, world_size: int, accumulation: int, workers: int
) -> None:
    ranks = loaders(replace(config, workers=workers), world_size, accumulation)
    assert_equal(joined(read(ranks)), reference)


def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(loader: TrainLoader, reference: Stream) -> None:
    for start in range(1, STOP):
        assert_equal(joined(read([loader], start)), reference[start:])
    stopped = loader.iterate(0, STOP)
    next(stopped)
    stopped.close()
    assert_equal(joined(read([loader])), reference)


MASK = (1 << 64) - 1


def word(ticket: int, draw: int) -> int:
    """The hash in whole numbers of any size."""
    state = key(SEED, "ffcv")
    for part in (ticket, draw):
        state = (state + (part + 1) * 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def view(pixels: np.ndarray, config: DataConfig, ticket: int) -> np.ndarray:
    """Crop, resize and flips of an image, (SIZE, SIZE, 3), in plain Python and OpenCV."""
    draws = iter(range(1000))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * ((word(ticket, next(draws)) >> 11) * 2.0**-53)

    height, width = pixels.shape[:2]
    for _ in range(10):
        area = height * width * uniform(*config.augment.scale)
        ratio = math.exp(uniform(*map(math.log, config.augment.ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = int(uniform(0, height - h + 1)), int(uniform(0, width - w + 1))
        if w <= width and h <= height:
            break
    else:
        raise AssertionError("all images here are nearly square")
    seen = cv2.resize(pixels[top : top + h, left : left + w], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    draws = iter((40, 41))
    if uniform(0, 1) < config.augment.hflip:
        seen = seen[:, ::-1]
    return seen[::-1] if uniform(0, 1) < config.augment.vflip else seen


def test_pixels_are_those_of_a_plain_computation(config: DataConfig, reference: Stream) -> None:
    originals = [decode(image) for image in images()]
    seen = set()
    for step, (pixels, _, indices, _) in enumerate(reference):
        for image, index in zip(pixels.permute(0, 2, 3, 1).numpy(), indices.tolist(), strict=True):
            expected = view(originals[index], config, step // STEPS * SAMPLES + index)
            difference = np.abs(image.astype(int) - expected)
            assert difference.mean() < 2, (step, index)
            if index in (PNG, CMYK):
                assert difference.max() <= 1  # no JPEG decoder in between, but another version of OpenCV
                seen.add(index)
    assert seen == {PNG, CMYK}


def test_crops_and_flips_have_their_distributions(config: DataConfig) -> None:
    from convneur.data.stream.ffcv import random_crop, random_word

    settings = np.array([0.08, 1.0, 3 / 4, 4 / 3, 0.5, 0.0])
    seed = np.uint64(key(1))
    crops = np.array([random_crop(300, 400, settings, seed, ticket) for ticket in range(4000)])
    top, left, height, width = crops.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 300) & (left + width <= 400)).all()
    area, ratio = height * width / 120000, width / height
    assert (area > 0.075).all()
    assert ((ratio > 0.74) & (ratio < 1.35)).all()
    assert abs(np.log(ratio[area < 0.31]).mean()) < 0.02
    assert abs((left / np.maximum(400 - width, 1)).mean() - 0.5) < 0.02
    assert abs((top / np.maximum(300 - height, 1)).mean() - 0.5) < 0.02
    # Where the area is small, all crops fit, and none is drawn again.
    assert abs((area < 0.31).mean() / (area < 0.195).mean() - 2) < 0.15
    words = np.array([random_word(seed, np.int64(ticket), 40) for ticket in range(4000)], np.uint64)
    assert abs((words >> np.uint64(63)).mean() - 0.5) < 0.03
    assert random_crop(20, 2000, settings, seed, 3)[2:] == (20, 27)  # nothing fits: the widest from the centre
    assert random_crop(2000, 20, settings, seed, 3) == (986, 0, 27, 20)
    for ratios in ((3 / 4, 4 / 3), (1 / 9, 1 / 7), (7.0, 9.0)):  # of an image of a pixel or two, at least one is shown
        for size in ((1, 1), (1, 2), (2, 1), (1, 500), (500, 1)):
            for ticket in range(20):
                top, left, height, width = random_crop(*size, np.array([0.08, 1.0, *ratios]), seed, ticket)
                assert 0 <= top < top + height <= size[0]
                assert 0 <= left < left + width <= size[1]


def test_views_of_a_sample_differ(config: DataConfig) -> None:
    repeated = replace(config, repeats=2)
    ours = joined(read(loaders(repeated), 0, 3))
    theirs = joined(read(loaders(other_engine(repeated)), 0, 3))
    views: dict[int, list[torch.Tensor]] = {}
    for (pixels, *mine), (_, *other) in zip(ours, theirs, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))
        for image, index in zip(pixels, mine[1].tolist(), strict=True):
            views.setdefault(index, []).append(image)
    assert {len(seen) for seen in views.values()} == {2}
    assert sum(torch.equal(*seen) for seen in views.values()) < 3


def damaged(config: DataConfig, folder: Path) -> tuple[DataConfig, set[int]]:
    """A copy with images that libjpeg-turbo refuses, one that decodes all the same, and a damaged one of pixels."""
    shutil.copytree(config.root, folder)
    store = BetonStore(folder, "train")
    content = bytearray(store.path.read_bytes())
    for number, place, size in ((3, 0, 40), (20, 0, 500), (33, 1500, 1), (PNG, 700, 1)):
        first = int(store.images["data_ptr"][number]) + place
        content[first : first + size] = bytes(byte ^ 1 for byte in content[first : first + size])
    store.path.write_bytes(content)
    return replace(config, root=str(folder)), {3, 20, 33, PNG}


def test_bad_samples_are_replaced_as_by_the_other_engine(config: DataConfig, reference: Stream, tmp_path: Path) -> None:
    config, bad = damaged(config, tmp_path / "damaged")
    (ours,), (theirs,) = loaders(config), loaders(other_engine(config))
    found = list(read([ours]))
    for (mine,), (other,), intact in zip(found, read([theirs]), reference, strict=True):
        assert torch.equal(mine.indices, other.indices)
        assert torch.equal(mine.labels, mine.indices % LABELS)
        assert mine.bad == other.bad
        assert all("checksum mismatch" in reason for _, reason in mine.bad)
        kept = mine.indices == intact[2]
        assert torch.equal(mine.images[kept], intact[0][kept])
        assert set(intact[2][~kept].tolist()) <= bad
    assert ours.bad_samples == theirs.bad_samples
    assert set(ours.bad_samples) == bad
    assert_equal(joined(read(loaders(config, 2))), joined(iter(found)))


def test_what_was_bad_before_is_replaced_too(config: DataConfig, tmp_path: Path) -> None:
    photos = images()
    bad = {5: b"no image", 6: b"", 7: photos[7][:700]}
    for number, image in bad.items():
        photos[number] = image
    config = write_dataset(tmp_path, photos)
    (ours,), (theirs,) = loaders(config), loaders(other_engine(config))
    for (mine,), (other,) in zip(read([ours], 0, 12), read([theirs], 0, 12), strict=True):
        assert torch.equal(mine.indices, other.indices)
        assert mine.bad == other.bad
    assert set(ours.bad_samples) == set(bad)


def test_nothing_but_bad_samples_ends_in_one_line(tmp_path: Path) -> None:
    config = write_dataset(tmp_path, [b"x"] * SAMPLES)
    with pytest.raises(InputError, match=rf"^.*not a readable image.*the {REPLACEMENTS - 1} drawn before.*$"):
        next(loaders(config)[0].iterate(0, 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_exception_in_ffcvs_thread_is_no_hang(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (loader,) = loaders(config)
    monkeypatch.setattr(loader, "_tickets", lambda request: np.array(["none"] * 16))
    with pytest.raises(RuntimeError, match="FFCV's loader has died"):
        next(loader.iterate(0, 1))


def test_a_stream_of_the_other_engine_is_refused(config: DataConfig, loader: TrainLoader) -> None:
    (other,) = loaders(other_engine(config))
    loader.check_state(loader.state(3))
    for mine, theirs in ((loader, other), (other, loader)):
        with pytest.raises(InputError, match=r"^the checkpoint's data stream has engine '(ffcv|webdataset)'"):
            mine.check_state(theirs.state(3))


ONE_CORE = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import sys
from dataclasses import replace
from convneur.data.config import DataConfig
from convneur.data.stores.choose import open_store
from convneur.data.stream.choose import build_train_loader
config = DataConfig(root=sys.argv[1], engine="ffcv", interpolation="area", image_size=32, global_batch_size=128)
loader = build_train_loader(config, open_store(config, "train"), seed=0, rank=0, world_size=1, accumulation=1)
print(sum(len(batch.labels) for (batch,) in loader.iterate(0, 2)))
import numba
assert numba.threading_layer() != "tbb"
"""


def test_a_process_on_one_core_ends(digits: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    prepare_digits(folder, "ffcv")
    command = [sys.executable, "-P", "-c", ONE_CORE, str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout == "256\n"


def test_a_run_in_two_processes_stopped_and_resumed_equals_an_uninterrupted_one(
    digits: Path, world: World, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    prepare_digits(folder, "ffcv")
    run_ranks(RANKS / "ffcv_runs.py", folder, tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert_same_files(newest(whole), newest(stopped))
    losses = [[r["train/loss"] for r in read_metrics(run) if "train/loss" in r] for run in (whole, stopped)]
    assert losses[0] == losses[1]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["images"] == STEPS_A_RUN * BATCH
    assert summary["top1"] > 0.3  # chance is 0.1
    scores = evaluate_checkpoint(whole, world, data_root=str(digits), split=None, averaged=False)
    assert scores.top1 == summary["top1"]  # by another number of ranks, from shards
