"""A dataset of ImageNet's size: how soon it is open, and how soon the first batch is there."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from convneur.data.config import DataConfig
from convneur.data.format.index import INDEX_FIELDS, Scan, write_index
from convneur.data.format.manifest import Manifest, Shard
from convneur.data.format.selection import Tally
from convneur.data.format.shards import Sample
from convneur.data.stores.tar import TarStore
from convneur.data.stream.train import TrainLoader


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of 1,282 shards with 1.28 million samples. The shards are sparse, all but the sizes."""
    folder = tmp_path_factory.mktemp("large")
    shards, per_shard = 1282, 1000
    scans = []
    for number in range(shards):
        rows = np.zeros(per_shard, dtype=[*INDEX_FIELDS, ("key", "S24")])
        rows["offset"], rows["size"] = np.arange(per_shard) * 110_000, 100_000
        rows["label"] = (np.arange(per_shard) + number) % 1000
        rows["key"] = [b"n%08d_%d" % (number, sample) for sample in range(per_shard)]
        path = folder / f"train-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(per_shard * 110_000)
        scans.append(Scan(Shard(path.name, per_shard * 110_000, 0, per_shard), rows, Tally()))
    split = write_index(folder, "train", scans)
    Manifest("test", tuple(map(str, range(1000))), {"train": split}).write(folder)
    return folder


def test_an_index_of_imagenets_size_opens_within_two_seconds(large: Path) -> None:
    taken = []
    for _ in range(3):
        start = time.process_time()
        store = TarStore(large, "train")
        assert (len(store), len(store.shard_sizes)) == (1_282_000, 1282)
        taken.append(time.process_time() - start)
    assert min(taken) < 2


def test_the_first_batch_at_step_300000_comes_as_soon_as_at_step_0(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TarStore(large, "train")
    sample = Sample("a", simplejpeg.encode_jpeg(np.zeros((8, 8, 3), dtype=np.uint8)), 0)
    monkeypatch.setattr(TarStore, "read", lambda *_: sample)  # the shards hold no images
    config = replace(DataConfig(), workers=0, image_size=8, global_batch_size=1024)
    taken: dict[int, list[float]] = {0: [], 300_000: []}
    for _ in range(3):
        for step, seconds in taken.items():
            start = time.process_time()
            loader = TrainLoader(config, store, seed=0, rank=0, world_size=8, accumulation=1)
            (batch,) = next(loader.iterate(step, step + 1))
            seconds.append(time.process_time() - start)
            assert batch.epoch == step // 1251
            assert batch.indices.shape == (128,)
    assert min(taken[300_000]) < 1.5 * min(taken[0]) + 0.05
