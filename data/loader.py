"""Micro-batches of an optimizer step, for each rank, in the one order that all world sizes share.

Legend: N samples, L lanes, B global batch size, R ranks, A micro-batches an optimizer step and rank, b = B / (R A)
samples a micro-batch, H x W pixels.

Micro-batch a of rank r owns the lanes m L / (R A) to (m + 1) L / (R A), m = r A + a. Workers have no state: a request
names all that a micro-batch depends on.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.keys import key, libraries_restored, seed_libraries
from convneur.data.order import LaneOrder
from convneur.data.store import Store
from convneur.data.transforms import Transform, decode, eval_transform, train_transform

STATE_FORMAT = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images: (b, 3, H, W) uint8, lane by lane.
        labels: (b,) int64.
        indices: (b,) int64, the samples' numbers in the store.
        epoch: counted from 0.
        step: optimizer steps before this one, over all epochs.
        lanes: lanes that contributed, b / len(lanes) samples each.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    epoch: int
    step: int
    lanes: range

    def pin_memory(self) -> "Batch":
        """Copy the images and labels to page-locked memory; the DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class EvalBatch(NamedTuple):
    """Samples to evaluate, b = eval_batch_size of them on each rank.

    Attributes:
        images: (b, 3, H, W) uint8; zeros where masked.
        labels: (b,) int64; zeros where masked.
        mask: (b,) bool, False for padding.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


class TrainLoader:
    """The stream of training samples, as one rank sees it.

    Args:
        config: what `check_data` found right.
        store: the training split.
        seed: the run's seed.
        rank: this rank, 0..world_size-1.
        world_size: R.
        accumulation: A.
    """

    def __init__(self, config: DataConfig, store: Store, *, seed: int, rank: int, world_size: int, accumulation: int):
        self._order = LaneOrder(
            store.shard_sizes,
            seed=seed,
            lanes=config.lanes,
            batch_size=config.global_batch_size,
            window=config.window,
        )
        self._config, self._seed = config, seed
        self._dataset = _TrainDataset(store, train_transform(config), seed)
        share = config.lanes // (world_size * accumulation)
        first = rank * accumulation
        self._micro_lanes = [range(m * share, (m + 1) * share) for m in range(first, first + accumulation)]
        self.steps_per_epoch = self._order.steps_per_epoch
        self.index_hash = store.index_hash

    def iterate(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Read optimizer steps `start_step` to `stop_step - 1`, counted over all epochs, with one set of workers.

        Starting anywhere costs the same; nothing is replayed.

        Yields:
            This rank's A micro-batches of a step.

        Raises:
            InputError: a sample is damaged.
        """
        batches = iter(_loader(self._dataset, self._requests(start_step, stop_step), self._config.workers))
        for _ in range(start_step, stop_step):
            yield [_unwrap(next(batches)) for _ in self._micro_lanes]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold to resume after `step` optimizer steps; nothing in it depends on the rank."""
        return {
            "format": STATE_FORMAT,
            "seed": self._seed,
            "global_batch_size": self._config.global_batch_size,
            "lanes": self._config.lanes,
            "window": self._config.window,
            "index_hash": self.index_hash,
            "epoch": step // self.steps_per_epoch,
            "step": step,
        }

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Check that a checkpoint's `state` belongs to this very stream, so that going on at its step is exact.

        Raises:
            InputError: something the stream depends on differs.
        """
        for name, here in self.state(saved.get("step", 0)).items():
            if saved.get(name) != here:
                raise InputError(
                    f"the checkpoint's data stream has {name} {saved.get(name)!r}, this run {here!r}: "
                    f"resume with the former, or start a new run"
                )

    def _requests(self, start_step: int, stop_step: int) -> Iterator["_Request"]:
        for step in range(start_step, stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            for lanes in self._micro_lanes:
                yield _Request(epoch, step, lanes, self._order.samples(epoch, position, lanes).ravel())


class EvalLoader:
    """Every sample of a split exactly once over all ranks: rank r evaluates samples r, r + R, ...

    All ranks have the same number of batches of the same shape; what is missing is padded and masked.

    Args:
        config: has eval_batch_size, workers and what the transform needs.
        store: the split.
        rank: this rank, 0..world_size-1.
        world_size: R.
    """

    def __init__(self, config: DataConfig, store: Store, *, rank: int, world_size: int):
        batch_size = config.eval_batch_size
        samples = np.arange(rank, len(store), world_size)
        largest = -(-len(store) // world_size)
        requests = [samples[first : first + batch_size] for first in range(0, largest, batch_size)]
        dataset = _EvalDataset(store, eval_transform(config), batch_size, config.image_size)
        self._batches = len(requests)
        self._loader = _loader(dataset, requests, config.workers, persistent=True)

    def __len__(self) -> int:
        """Batches on each rank."""
        return self._batches

    def __iter__(self) -> Iterator[EvalBatch]:
        """Go through this rank's samples once.

        Raises:
            InputError: a sample is damaged.
        """
        return map(_unwrap, self._loader)


class _Request(NamedTuple):
    """All that a micro-batch depends on."""

    epoch: int
    step: int
    lanes: range
    indices: np.ndarray


class _TrainDataset(Dataset[Batch | InputError]):
    """Reads and augments a micro-batch. An `InputError` is returned: raised in a worker, it would lose its one line."""

    def __init__(self, store: Store, transform: Transform, seed: int):
        self._store, self._transform, self._seed = store, transform, seed

    def __getitem__(self, request: _Request) -> Batch | InputError:
        images, labels = [], []
        try:
            with libraries_restored():
                for index in request.indices.tolist():
                    seed_libraries(key(self._seed, "augment", request.epoch, index))
                    image, label = _read(self._store, index, self._transform)
                    images.append(image)
                    labels.append(label)
        except InputError as error:
            return error
        return Batch(
            images=torch.stack(images),
            labels=torch.tensor(labels),
            indices=torch.from_numpy(request.indices),
            epoch=request.epoch,
            step=request.step,
            lanes=request.lanes,
        )


class _EvalDataset(Dataset[EvalBatch | InputError]):
    """Reads a batch of samples, fewer than its size perhaps, and pads it."""

    def __init__(self, store: Store, transform: Transform, batch_size: int, image_size: int):
        self._store, self._transform = store, transform
        self._batch_size, self._image_size = batch_size, image_size

    def __getitem__(self, indices: np.ndarray) -> EvalBatch | InputError:
        images = torch.zeros(self._batch_size, 3, self._image_size, self._image_size, dtype=torch.uint8)
        labels = torch.zeros(self._batch_size, dtype=torch.int64)
        try:
            for position, index in enumerate(indices.tolist()):
                images[position], labels[position] = _read(self._store, index, self._transform)
        except InputError as error:
            return error
        return EvalBatch(images, labels, mask=torch.arange(self._batch_size) < len(indices))


def _read(store: Store, index: int, transform: Transform) -> tuple[torch.Tensor, int]:
    """Read, decode and transform a sample to (3, H, W) uint8 and its label."""
    sample = store.read(index)
    try:
        image = decode(sample.image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{store.where(index)}: not a readable image ({error}); replace it and prepare again"
        ) from None
    return transform(image), sample.label


def _loader(
    dataset: Dataset[Any], requests: Iterable[Any], workers: int, *, persistent: bool = False
) -> DataLoader[Any]:
    """One request, one batch, in order. The DataLoader draws a seed: from a generator of its own, not the process's."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and workers > 0,
        generator=torch.Generator(),
    )


def _unwrap(result: T | InputError) -> T:
    if isinstance(result, InputError):
        raise result
    return result
