"""Every sample of a split once, in batches of one shape.

Legend: N samples, R ranks, b = eval_batch_size samples in a batch of a rank, H x W pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from convneur.data.config import DataConfig
from convneur.data.errors import InputError, SampleError
from convneur.data.stores.store import Store
from convneur.data.stream.batch import BadSample, EvalBatch
from convneur.data.stream.reading import blamed_on_sample
from convneur.data.stream.workers import Slots, request_loader, results, slot_count, unwrap
from convneur.data.views.transforms import EvalTransform


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
        # Not more memory than there are batches; a slot is always the same worker's, in one evaluation.
        slots = min(slot_count(config.workers), max(len(requests), 1))
        self._slots = Slots(slots, batch_size, config.image_size)
        dataset = _EvalDataset(store, EvalTransform(config), self._slots)
        self._batches = len(requests)
        self._loader = request_loader(dataset, list(enumerate(requests)), config.workers, persistent=True)

    def __len__(self) -> int:
        """Batches on each rank."""
        return self._batches

    def __iter__(self) -> Iterator[EvalBatch]:
        """Goes through this rank's samples once.

        Raises:
            InputError: the storage fails time and again.
            WorkerError: a worker was killed.
        """
        for made in results(self._loader):
            yield unwrap(made).batch(self._slots)


class _EvalMade(NamedTuple):
    """What a worker says of a batch to evaluate whose images it has left in the slot of request `number`."""

    number: int
    labels: list[int]
    mask: list[bool]
    bad: tuple[BadSample, ...]

    def batch(self, slots: Slots) -> EvalBatch:
        """The batch, its images copied out of the slot."""
        return EvalBatch(slots.copied(self.number), torch.tensor(self.labels), torch.tensor(self.mask), self.bad)


class _EvalDataset(Dataset[_EvalMade | InputError]):
    """Reads a batch of samples, fewer than its size perhaps, and pads it."""

    def __init__(self, store: Store, transform: EvalTransform, slots: Slots):
        self._store, self._transform, self._slots = store, transform, slots

    def __getitem__(self, numbered: tuple[int, np.ndarray]) -> _EvalMade | InputError:
        number, indices = numbered
        images = self._slots[number].zero_()
        labels, mask = [0] * len(images), [False] * len(images)
        bad = []
        for position, index in enumerate(indices.tolist()):
            try:
                sample = self._store.read(index)
                with blamed_on_sample(self._store, index):
                    self._transform.show(sample.image, images[position], proven=sample.proven)
                labels[position], mask[position] = sample.label, True
            except SampleError as error:
                bad.append(BadSample(index, str(error)))
            except InputError as error:
                return error
        return _EvalMade(number, labels, mask, tuple(bad))
