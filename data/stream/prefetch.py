"""A process that fetches shards from servers ahead of the workers that read them."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from typing import TypeAlias

from convneur.data.errors import InputError
from convneur.data.stores.store import Store
from convneur.data.stream.batch import Request

PREFETCH_STEPS = 64
"""How many optimizer steps ahead remote shards are fetched."""

Reached: TypeAlias = "Synchronized[int]"
"""The optimizer step that training has reached, shared by both processes."""


@contextmanager
def prefetching(store: Store, requests: Iterable[Request], start_step: int) -> Iterator[Reached]:
    """Lets a process fetch the shards of `requests`, in their order, while the block lasts; none for a local store.

    Args:
        store: where the samples come from.
        requests: what will be read.
        start_step: optimizer step of the first request.

    Yields:
        Takes the step that training has reached; the process stays at most `PREFETCH_STEPS` ahead of it.
    """
    context = get_context("fork")
    reached: Reached = context.Value("q", start_step)
    if not store.is_remote:
        yield reached
        return
    # A process: a thread that held a lock while workers were forked would leave them waiting for it.
    process = context.Process(target=_prefetch, args=(store, requests, reached, os.getpid()), daemon=True)
    process.start()
    try:
        yield reached
    finally:
        process.kill()  # it may have inherited a handler for TERM; what it leaves half-fetched, the cache removes
        process.join()


def _prefetch(store: Store, requests: Iterable[Request], reached: Reached, parent: int) -> None:
    """Fetches the shards of `requests`; a failure ends it, for the reader to report."""
    for request in requests:
        while request.step > reached.value + PREFETCH_STEPS:
            if os.getppid() != parent:
                return
            time.sleep(0.05)
        try:
            store.prefetch(request.indices)
        except (InputError, OSError):
            return
