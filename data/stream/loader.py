"""Micro-batches of an optimizer step, for each rank, in the one order that all world sizes share.

Legend: N samples, L lanes, B global batch size, R ranks, A micro-batches an optimizer step and rank, b = B / (R A)
samples a micro-batch, H x W pixels.

Micro-batch a of rank r owns the lanes m L / (R A) to (m + 1) L / (R A), m = r A + a. Workers have no state: a request
names all that a micro-batch depends on.
"""

import atexit
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from multiprocessing import active_children, get_context
from multiprocessing.sharedctypes import Synchronized
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from convneur.data.config import DataConfig
from convneur.data.errors import InputError, SampleError, WorkerError
from convneur.data.format.shards import Sample
from convneur.data.keys import key, libraries_restored, seed_libraries, view_key
from convneur.data.stores.store import Store
from convneur.data.stream.shuffle import lane_order
from convneur.data.views.transforms import (
    TrainTransform,
    Transform,
    View,
    decode,
    eval_transform,
    in_one_line,
    plain_jpeg_size,
)

STATE_FORMAT = 1
REPLACEMENTS = 16
"""How many unreadable samples in a row a single place of the stream puts up with."""

PREFETCH_BATCHES = 2
"""How many batches a worker makes ahead of the one that is waited for."""

AHEAD = 16
"""For how many views at a time a worker reads and draws before it decodes them."""

PREFETCH_STEPS = 64
"""How many optimizer steps ahead remote shards are fetched."""

T = TypeVar("T")
Reached: TypeAlias = "Synchronized[int]"


class BadSample(NamedTuple):
    """A sample that can't be read.

    Attributes:
        number: which one of the store's.
        reason: one line that names shard, split and key, and says what is wrong.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images: (b, 3, H, W) uint8 in channels_last memory format, lane by lane.
        labels: (b,) int64.
        indices: (b,) int64, the samples' numbers in the store.
        repetitions: (b,) int64, 0..data.repeats-1: which of a sample's views this is.
        epoch: counted from 0.
        step: optimizer steps before this one, over all epochs.
        lanes: lanes that contributed, b / len(lanes) samples each.
        bad: samples that should have been here; others stand in for them, and `labels` and `indices` are the others'.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    epoch: int
    step: int
    lanes: range
    repetitions: torch.Tensor
    bad: tuple[BadSample, ...] = ()


class EvalBatch(NamedTuple):
    """Samples to evaluate, b = eval_batch_size of them on each rank.

    Attributes:
        images: (b, 3, H, W) uint8; zeros where masked.
        labels: (b,) int64; zeros where masked.
        mask: (b,) bool, False for padding and for bad samples.
        bad: samples that should have been here.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    bad: tuple[BadSample, ...] = ()


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
        """Read optimizer steps `start_step` to `stop_step - 1`, counted over all epochs, with one set of workers.

        Starting anywhere costs the same; nothing is replayed.

        Yields:
            This rank's A micro-batches of a step.

        Raises:
            InputError: the storage fails time and again, or hardly a sample can be read.
            WorkerError: a worker was killed.
        """
        workers, size = self._config.workers, self._config.image_size
        batch_size = self._config.global_batch_size // self._config.lanes * len(self._micro_lanes[0])
        # One more than are under way would do; as many for each worker, and a slot is always the same worker's.
        slots = _Slots(max((PREFETCH_BATCHES + 1) * workers, 1), batch_size, size)
        dataset = _TrainDataset(self._store, self._transform, self._seed, slots)
        batches = _made(_loader(dataset, enumerate(self._requests(start_step, stop_step)), workers))
        try:
            with self._prefetching(start_step, stop_step) as reached:
                for step in range(start_step, stop_step):
                    reached.value = step
                    micro_batches: list[Batch] = [_unwrap(next(batches)).batch(slots) for _ in self._micro_lanes]
                    for batch in micro_batches:
                        self.bad_samples.update(batch.bad)
                    yield micro_batches
        finally:
            del batches  # ends the workers, also while an error's traceback keeps this frame

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
            "index_hash": self.index_hash,
            "epoch": step // self.steps_per_epoch,
            "step": step,
        }

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Check that a checkpoint's `state` belongs to this very stream, so that going on at its step is exact.

        Raises:
            InputError: something the stream depends on differs.
        """
        saved = {"block": 0, **saved}  # older ones have none
        for name, here in self.state(saved.get("step", 0)).items():
            if saved.get(name) != here:
                raise InputError(
                    f"the checkpoint's data stream has {name} {saved.get(name)!r}, this run {here!r}: "
                    f"resume with the former, or start a new run"
                )

    @contextmanager
    def _prefetching(self, start_step: int, stop_step: int) -> Iterator["Reached"]:
        """Let a process fetch remote shards in the order of the lanes, ahead of the step that is written down here."""
        context = get_context("fork")
        reached: Reached = context.Value("q", start_step)
        if not self._store.is_remote:
            yield reached
            return
        requests = self._requests(start_step, stop_step)
        # A process: a thread that held a lock while workers were forked would leave them waiting for it.
        process = context.Process(target=_prefetch, args=(self._store, requests, reached, os.getpid()), daemon=True)
        process.start()
        try:
            yield reached
        finally:
            process.kill()  # it may have inherited a handler for TERM; what it leaves half-fetched, the cache removes
            process.join()

    def _requests(self, start_step: int, stop_step: int) -> Iterator["Request"]:
        for step in range(start_step, stop_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            for lanes in self._micro_lanes:
                samples = self._order.samples(epoch, position, lanes)
                repetitions = np.tile(self._order.repetitions(position), len(lanes))
                first = position * self._config.global_batch_size + lanes.start * samples.shape[1]
                yield Request(epoch, step, lanes, first, samples.ravel(), repetitions)


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
        slots = max((PREFETCH_BATCHES + 1) * config.workers, 1)
        self._slots = _Slots(min(slots, max(len(requests), 1)), batch_size, config.image_size)
        dataset = _EvalDataset(store, eval_transform(config), self._slots)
        self._batches = len(requests)
        self._loader = _loader(dataset, list(enumerate(requests)), config.workers, persistent=True)

    def __len__(self) -> int:
        """Batches on each rank."""
        return self._batches

    def __iter__(self) -> Iterator[EvalBatch]:
        """Go through this rank's samples once.

        Raises:
            InputError: the storage fails time and again.
            WorkerError: a worker was killed.
        """
        for made in _made(self._loader):
            yield _unwrap(made).batch(self._slots)


class Request(NamedTuple):
    """All that a micro-batch depends on: the samples `indices` stand at places `first`, `first` + 1, ... of `epoch`.

    `repetitions` says for each which of its views is due.
    """

    epoch: int
    step: int
    lanes: range
    first: int
    indices: np.ndarray
    repetitions: np.ndarray


def _prefetch(store: Store, requests: Iterable[Request], reached: Reached, parent: int) -> None:
    """Fetch the shards of `requests`, up to `PREFETCH_STEPS` ahead; a failure ends it, for the reader to report."""
    for request in requests:
        while request.step > reached.value + PREFETCH_STEPS:
            if os.getppid() != parent:
                return
            time.sleep(0.05)
        try:
            store.prefetch(request.indices)
        except (InputError, OSError):
            return


class _Slots:
    """Memory for the images of some batches, shared with the workers that are forked later.

    It takes no room in /dev/shm, which containers keep small. New memory for each batch would cost a page fault
    every 4 KiB, in the worker and in the training process. So does, once, every slot that a worker writes to.
    """

    def __init__(self, slots: int, batch_size: int, image_size: int):
        shape = (slots, batch_size, image_size, image_size, 3)
        images = torch.frombuffer(mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)
        self._images = images.permute(0, 1, 4, 2, 3)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Room for the images of request `number`, (b, 3, H, W) uint8 in channels_last memory format."""
        return self._images[number % len(self._images)]


@dataclass(frozen=True)
class _Made:
    """What a worker says of a micro-batch whose images it has left in the slot of request `number`."""

    number: int
    request: Request
    indices: list[int]
    labels: list[int]
    bad: tuple[BadSample, ...]

    def batch(self, slots: _Slots) -> Batch:
        """The micro-batch, its images copied: into page-locked memory where there is a GPU."""
        images = torch.empty_like(slots[self.number], pin_memory=torch.cuda.is_available())
        return Batch(
            images=images.copy_(slots[self.number]),
            labels=torch.tensor(self.labels),
            indices=torch.tensor(self.indices),
            epoch=self.request.epoch,
            step=self.request.step,
            lanes=self.request.lanes,
            repetitions=torch.from_numpy(self.request.repetitions),
            bad=self.bad,
        )


class _TrainDataset(Dataset[_Made | InputError]):
    """Reads and augments a micro-batch. An `InputError` is returned: raised in a worker, it would lose its one line."""

    def __init__(self, store: Store, transform: TrainTransform, seed: int, slots: _Slots):
        self._store, self._transform, self._seed, self._slots = store, transform, seed, slots

    def __getitem__(self, numbered: tuple[int, Request]) -> _Made | InputError:
        number, request = numbered
        images = self._slots[number]
        bad: list[BadSample] = []
        indices, labels = [], []
        last = _LastImage(self._store)
        try:
            with libraries_restored():
                for offset, drawn in enumerate(self._drawn(request)):
                    index, label = read_or_replace(
                        partial(self._show, last, request.epoch, drawn, images[offset]),
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
        return _Made(number, request, indices, labels, tuple(bad))

    def _drawn(self, request: Request) -> Iterator["_Drawn"]:
        """Read and draw for `AHEAD` views at a time: between two images, decoding empties the processor's caches."""
        views = list(zip(request.indices.tolist(), request.repetitions.tolist(), strict=True))
        for first in range(0, len(views), AHEAD):
            yield from [self._draw(request.epoch, *view) for view in views[first : first + AHEAD]]

    def _draw(self, epoch: int, index: int, repetition: int) -> "_Drawn":
        sample = view = None
        if self._transform.draws_all:
            with suppress(SampleError), blamed_on_sample(self._store, index):  # `_show` meets it again
                sample = self._store.read(index)
                if size := plain_jpeg_size(sample.image):
                    self._seed_view(epoch, index, repetition)
                    view = self._transform.draw(*size)
        return _Drawn(index, repetition, sample, view)

    def _show(self, last: "_LastImage", epoch: int, drawn: "_Drawn", seen: torch.Tensor, index: int) -> int:
        """Leave in `seen` what is drawn, or the sample that stands in for it; its label."""
        if index == drawn.number and drawn.view:
            pixels, label = last.read(index, drawn.sample)
            view: View | None = drawn.view
        else:
            pixels, label = last.read(index)
            self._seed_view(epoch, index, drawn.repetition)
            view = None
        with blamed_on_sample(self._store, index):
            self._transform.show(pixels, view or self._transform.draw(*pixels.shape[:2]), seen)
        return label

    def _seed_view(self, epoch: int, index: int, repetition: int) -> None:
        seed_libraries(view_key(self._seed, "augment", epoch, index, repetition))


class _Drawn(NamedTuple):
    """A view of a sample; the sample, if it could be read, and what is shown of it, if that is drawn already."""

    number: int
    repetition: int
    sample: Sample | None
    view: View | None


class _LastImage:
    """Decodes samples; the last one only once, as repeated views of it follow each other."""

    def __init__(self, store: Store):
        self._store = store
        self._index = -1

    def read(self, index: int, sample: Sample | None = None) -> tuple[np.ndarray, int]:
        """Pixels and label of a sample, which may have been read already; raises what `_read` does."""
        if index != self._index:
            self._read = _read(self._store, index, sample)
            self._index = index
        return self._read


def read_or_replace(
    read: Callable[[int], T], samples: int, *, seed: int, epoch: int, place: int, index: int, bad: list[BadSample]
) -> tuple[int, T]:
    """Read the sample at a place of an epoch or, if it can't be read, one that stands in for it.

    Args:
        read: what to read a sample with.
        samples: N.
        seed: the run's seed.
        epoch: counted from 0.
        place: in the epoch.
        index: the sample's number.
        bad: takes what can't be read.

    Returns:
        The number of the sample that was read, and what `read` made of it.

    Raises:
        InputError: none of `REPLACEMENTS` samples can be read.
    """
    for attempt in range(REPLACEMENTS):
        try:
            return index, read(index)
        except SampleError as error:
            bad.append(BadSample(index, str(error)))
        index = key(seed, "replacement", epoch, place, attempt) % samples
    raise InputError(
        f"{bad[-1].reason}; so are the {REPLACEMENTS - 1} drawn before it: check the dataset with "
        "`convneur data verify`"
    )


class _EvalMade(NamedTuple):
    """What a worker says of a batch to evaluate whose images it has left in the slot of request `number`."""

    number: int
    labels: list[int]
    mask: list[bool]
    bad: tuple[BadSample, ...]

    def batch(self, slots: _Slots) -> EvalBatch:
        """The batch, its images copied: into page-locked memory where there is a GPU."""
        images = torch.empty_like(slots[self.number], pin_memory=torch.cuda.is_available())
        images.copy_(slots[self.number])
        return EvalBatch(images, torch.tensor(self.labels), torch.tensor(self.mask), self.bad)


class _EvalDataset(Dataset[_EvalMade | InputError]):
    """Reads a batch of samples, fewer than its size perhaps, and pads it."""

    def __init__(self, store: Store, transform: Transform, slots: _Slots):
        self._store, self._transform, self._slots = store, transform, slots

    def __getitem__(self, numbered: tuple[int, np.ndarray]) -> _EvalMade | InputError:
        number, indices = numbered
        images = self._slots[number].zero_()
        labels, mask = [0] * len(images), [False] * len(images)
        bad = []
        for position, index in enumerate(indices.tolist()):
            try:
                pixels, label = _read(self._store, index)
                with blamed_on_sample(self._store, index):
                    images[position] = self._transform(pixels)
                labels[position], mask[position] = label, True
            except SampleError as error:
                bad.append(BadSample(index, str(error)))
            except InputError as error:
                return error
        return _EvalMade(number, labels, mask, tuple(bad))


def _read(store: Store, index: int, sample: Sample | None = None) -> tuple[np.ndarray, int]:
    """Read a sample, unless that is done, and decode it to (height, width, 3) uint8 and its label.

    Raises:
        SampleError: its bytes are damaged or not an image.
        InputError: the storage fails.
    """
    sample = sample or store.read(index)
    with blamed_on_sample(store, index):
        return decode(sample.image), sample.label


@contextmanager
def blamed_on_sample(store: Store, index: int) -> Iterator[None]:
    """Make whatever goes wrong in decoding and transforming a sample that sample's fault, a want of memory too.

    Raises:
        SampleError: something went wrong; names the sample.
        InputError: the storage fails.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a decoder or a resize may raise anything
        raise SampleError(f"{store.where(index)}: not a readable image ({in_one_line(error)})") from None


def _loader(
    dataset: Dataset[Any], requests: Iterable[Any], workers: int, *, persistent: bool = False
) -> DataLoader[Any]:
    """One request, one batch, in order. The DataLoader draws a seed: from a generator of its own, not the process's."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # `_Slots` are inherited
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),
    )


def _made(loader: DataLoader[T]) -> Iterator[T]:
    """What the workers make; WorkerError where one of them is gone.

    torch's handler for that would raise at once, wherever the process is: in the middle of a step, or of a save.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            gone = [worker for worker in getattr(batches, "_workers", []) if worker.exitcode]
            if not gone:
                raise
            code = gone[0].exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
            raise WorkerError(
                f"decoding process {gone[0].pid} {how}; if memory was short, lower data.workers; --resume auto goes on"
            ) from error
        if batch is None:
            return
        yield batch


def _ignore_stop_signals(_: int) -> None:
    """Keeps a worker alive when all processes of a job or a terminal are signalled: the rank has a step to finish.

    A worker whose rank has ended ends by itself; one whose rank is about to end is killed by `_end_workers`.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill what an error left running: multiprocessing would send TERM, which workers ignore, and wait for ever."""
    if left := [process for process in active_children() if process.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each as a fault of its own
        for process in left:
            process.kill()


def _unwrap(result: T | InputError) -> T:
    if isinstance(result, InputError):
        raise result
    return result
