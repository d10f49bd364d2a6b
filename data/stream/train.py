"""Micro-batches of an optimizer step, for each rank, in the one order that all world sizes share.

Legend: N samples, L lanes, B global batch size, R ranks, A micro-batches an optimizer step and rank, b = B / (R A)
samples a micro-batch, H x W pixels.

Micro-batch a of rank r owns the lanes m L / (R A) to (m + 1) L / (R A), m = r A + a. Workers have no state: a request
names all that a micro-batch depends on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from convneur.data.config import DataConfig
from convneur.data.errors import InputError, SampleError
from convneur.data.format.shards import Sample
from convneur.data.keys import libraries_restored, seed_libraries, view_key
from convneur.data.stores.store import Store
from convneur.data.stream.batch import BadSample, Batch, Request
from convneur.data.stream.prefetch import prefetching
from convneur.data.stream.reading import blamed_on_sample, read_or_replace
from convneur.data.stream.shuffle import lane_order
from convneur.data.stream.workers import Slots, request_loader, results, slot_count, unwrap
from convneur.data.views.decode import decode, plain_jpeg_size
from convneur.data.views.transforms import TrainTransform
from convneur.data.views.view import View

STATE_FORMAT = 1
AHEAD = 16
"""For how many views at a time a worker reads and draws before it decodes them."""


class TrainLoader:
    """The stream of training samples, as one rank sees it.

    A sample that can't be read is replaced by one drawn from (seed, epoch, place in the epoch, attempt), so the stream
    stays the same for every number of ranks; `bad_samples` collects those that this rank has met, number and reason.

    Args:
        config: what `check_data` found right.
        store: the training split.
        seed: the run's seed.
        rank: this rank, 0..world_size-1.
        world_size: R.
        accumulation: A.
    """

    def __init__(self, config: DataConfig, store: Store, *, seed: int, rank: int, world_size: int, accumulation: int):
        self._order = lane_order(config, store, seed)
        self._config, self._seed, self._store = config, seed, store
        self._transform = TrainTransform(config)
        share = config.lanes // (world_size * accumulation)
        first = rank * accumulation
        self._micro_lanes = [range(m * share, (m + 1) * share) for m in range(first, first + accumulation)]
        self.steps_per_epoch = self._order.steps_per_epoch
        self.index_hash = store.index_hash
        self.bad_samples: dict[int, str] = {}

    def iterate(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Reads optimizer steps `start_step` to `stop_step - 1`, counted over all epochs, with one set of workers.

        Starting anywhere costs the same; nothing is replayed.

        Yields:
            This rank's A micro-batches of a step.

        Raises:
            InputError: the storage fails time and again, or hardly a sample can be read.
            WorkerError: a worker was killed.
        """
        workers, size = self._config.workers, self._config.image_size
        batch_size = self._config.global_batch_size // self._config.lanes * len(self._micro_lanes[0])
        slots = Slots(slot_count(workers), batch_size, size)
        batches = results(
            request_loader(self._dataset(slots), enumerate(self._requests(start_step, stop_step)), workers)
        )
        try:
            with prefetching(self._store, self._requests(start_step, stop_step), start_step) as reached:
                for step in range(start_step, stop_step):
                    reached.value = step
                    micro_batches: list[Batch] = [
                        self._finished(unwrap(next(batches)), slots) for _ in self._micro_lanes
                    ]
                    for batch in micro_batches:
                        self.bad_samples.update(batch.bad)
                    yield micro_batches
        finally:
            del batches  # ends the workers, also while an error's traceback keeps this frame

    def _dataset(self, slots: Slots) -> "TrainDataset":
        return TrainDataset(self._store, self._transform, self._seed, self._config.repeats, slots)

    def _finished(self, made: "Made", slots: Slots) -> Batch:
        return made.batch(slots)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold to resume after `step` optimizer steps; nothing in it depends on the rank."""
        return {
            "format": STATE_FORMAT,
            "seed": self._seed,
            "global_batch_size": self._config.global_batch_size,
            "lanes": self._config.lanes,
            "window": self._config.window,
            "block": self._config.block,
            "repeats": self._config.repeats,
            "engine": self._config.engine,
            "decode": self._config.decode,
            "index_hash": self.index_hash,
            "epoch": step // self.steps_per_epoch,
            "step": step,
        }

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Checks that a checkpoint's `state` belongs to this very stream, so that going on at its step is exact.

        Raises:
            InputError: something the stream depends on differs.
        """
        saved = {"block": 0, "decode": "cpu", **saved}  # older ones have none
        for name, here in self.state(saved.get("step", 0)).items():
            if saved.get(name) != here:
                raise InputError(
                    f"the checkpoint's data stream has {name} {saved.get(name)!r}, this run {here!r}: "
                    f"resume with the former, or start a new run"
                )

    def _requests(self, start_step: int, stop_step: int) -> Iterator[Request]:
        for step in range(start_step, stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            for lanes in self._micro_lanes:
                samples = self._order.samples(epoch, position, lanes)
                repetitions = np.tile(self._order.repetitions(position), len(lanes))
                first = position * self._config.global_batch_size + lanes.start * samples.shape[1]
                yield Request(epoch, step, lanes, first, samples.ravel(), repetitions)


@dataclass(frozen=True)
class Made:
    """What a worker says of a micro-batch whose images it has left in the slot of request `number`."""

    number: int
    request: Request
    indices: list[int]
    labels: list[int]
    bad: tuple[BadSample, ...]

    def batch(self, slots: Slots) -> Batch:
        """The micro-batch, its images copied out of the slot."""
        return Batch(
            images=slots.copied(self.number),
            labels=torch.tensor(self.labels),
            indices=torch.tensor(self.indices),
            epoch=self.request.epoch,
            step=self.request.step,
            lanes=self.request.lanes,
            repetitions=torch.from_numpy(self.request.repetitions),
            bad=self.bad,
        )


class TrainDataset(Dataset[Made | InputError]):
    """Reads and augments a micro-batch. An `InputError` is returned: raised in a worker, it would lose its one line."""

    def __init__(self, store: Store, transform: TrainTransform, seed: int, repeats: int, slots: Slots):
        self._store, self._transform, self._seed, self._repeats, self._slots = store, transform, seed, repeats, slots

    def __getitem__(self, numbered: tuple[int, Request]) -> Made | InputError:
        number, request = numbered
        images = self._slots[number]
        bad: list[BadSample] = []
        indices, labels = [], []
        last = LastImage()
        try:
            with libraries_restored():
                for offset, drawn in enumerate(self._drawn(request)):
                    index, label = read_or_replace(
                        partial(self._show, last, request.epoch, drawn, images, offset),
                        len(self._store),
                        seed=self._seed,
                        epoch=request.epoch,
                        place=request.first + offset,
                        index=drawn.number,
                        bad=bad,
                    )
                    indices.append(index)
                    labels.append(label)
        except InputError as error:
            return error
        return Made(number, request, indices, labels, tuple(bad))

    def _drawn(self, request: Request) -> Iterator["Drawn"]:
        """Reads and draws for `AHEAD` views at a time: between two images, decoding empties the processor's caches."""
        views = list(zip(request.indices.tolist(), request.repetitions.tolist(), strict=True))
        for first in range(0, len(views), AHEAD):
            yield from [self._draw(request.epoch, *view) for view in views[first : first + AHEAD]]

    def _draw(self, epoch: int, index: int, repetition: int) -> "Drawn":
        view = None
        try:
            sample = self._store.read(index)
            with blamed_on_sample(self._store, index):
                if size := plain_jpeg_size(sample.image):
                    self._seed_view(epoch, index, repetition)
                    view = self._transform.choose(*size)
        except SampleError as error:
            return Drawn(index, repetition, error, None)
        return Drawn(index, repetition, sample, view)

    def _show(
        self, last: "LastImage", epoch: int, drawn: "Drawn", images: torch.Tensor, offset: int, index: int
    ) -> int:
        """Leaves what is drawn at its place among the images, or the sample that stands in for it; its label."""
        sample, view = (drawn.sample, drawn.view) if index == drawn.number else (self._store.read(index), None)
        if isinstance(sample, SampleError):
            raise sample
        with blamed_on_sample(self._store, index):
            pixels = last.decoded(index, sample.image) if self._repeats > 1 else None
            if view is None:
                self._seed_view(epoch, index, drawn.repetition)
            if pixels is None:
                self._transform.show(sample.image, images[offset], view, sample.proven)
            else:
                self._transform.show_pixels(pixels, images[offset], view)
        return sample.label

    def _seed_view(self, epoch: int, index: int, repetition: int) -> None:
        seed_libraries(view_key(self._seed, "augment", epoch, index, repetition))


class Drawn(NamedTuple):
    """A view of a sample; the sample, or why it can't be read; and what is shown of it, if that can be told yet."""

    number: int
    repetition: int
    sample: Sample | SampleError
    view: View | None


class LastImage:
    """Decodes images; the last one only once, as repeated views of it follow each other."""

    def __init__(self) -> None:
        self._index = -1

    def decoded(self, index: int, image: bytes) -> np.ndarray:
        """Pixels of a sample, (height, width, 3) uint8; raises what `decode` does."""
        if index != self._index:
            self._pixels = decode(image)
            self._index = index
        return self._pixels
