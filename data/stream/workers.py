"""Worker processes that answer requests: their memory for images, their start and their end."""

import atexit
import gc
import math
import signal
import threading
from collections.abc import Iterable, Iterator
from mmap import mmap
from multiprocessing import active_children
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from convneur.data.errors import InputError, WorkerError

PREFETCH_BATCHES = 2
"""How many batches a worker makes ahead of the one that is waited for."""

T = TypeVar("T")


class Slots:
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

    def copied(self, number: int) -> torch.Tensor:
        """The images of request `number` in memory of their own: page-locked where there is a GPU."""
        images = self[number]
        return torch.empty_like(images, pin_memory=torch.cuda.is_available()).copy_(images)


def slot_count(workers: int) -> int:
    """How many slots so many workers need.

    One more than the batches under way would do; with as many for each worker a slot is always the same worker's.
    """
    return max((PREFETCH_BATCHES + 1) * workers, 1)


def request_loader(
    dataset: Dataset[Any], requests: Iterable[Any], workers: int, *, persistent: bool = False
) -> DataLoader[Any]:
    """One request, one batch, in order. The DataLoader draws a seed: from a generator of its own, not the process's."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # `Slots` are inherited
        prefetch_factor=PREFETCH_BATCHES if workers else None,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_begin,
        generator=torch.Generator(),
    )


def results(loader: DataLoader[T]) -> Iterator[T]:
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


def _begin(_: int) -> None:
    """Keeps a worker alive when all processes of a job or a terminal are signalled: the rank has a step to finish.

    A worker whose rank has ended ends by itself; one whose rank is about to end is killed by `_end_workers`.
    """
    gc.freeze()  # looking for garbage among what the rank has made would copy all of its memory
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kills what an error left running: multiprocessing would send TERM, which workers ignore, and wait for ever."""
    if left := [process for process in active_children() if process.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each as a fault of its own
        for process in left:
            process.kill()


def unwrap(result: T | InputError) -> T:
    """Raises the `InputError` that a worker has returned."""
    if isinstance(result, InputError):
        raise result
    return result
