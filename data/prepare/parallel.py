"""Work spread over the processors of a machine."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from convneur.data.errors import InputError
from convneur.data.prepare.progress import progress

T = TypeVar("T")
R = TypeVar("R")

_work: list[Callable[[Any], Any]] = []


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def in_parallel(
    work: Callable[[T], R], tasks: Sequence[T], processes: int, *, what: str, unit: str, sizes: Sequence[int]
) -> list[R]:
    """Does each of `tasks` in one of `processes` forked processes and shows the progress.

    What `work` closes over is inherited, not copied; tasks and results are pickled. If a task fails, or at Ctrl-C,
    those in progress are finished and the others dropped.

    Args:
        work: what to do; a module's function or a `functools.partial` of one.
        tasks: what to do it with.
        processes: how many at a time.
        what: name of the work, for the display.
        unit: what `sizes` counts, for the display.
        sizes: how much each task adds to the progress.

    Returns:
        The results, in the order of the tasks.

    Raises:
        InputError: `work` raised it, or an OSError such as a full disk; a process was killed; memory is short.
    """
    if not tasks:
        return []
    _work.append(work)  # forked processes find it here
    results: list[R | None] = [None] * len(tasks)
    pool = ProcessPoolExecutor(
        min(processes, len(tasks)), mp_context=get_context("fork"), initializer=_start, initargs=(os.getpid(),)
    )
    try:
        # Submitted before the display starts its thread: the first call forks all processes.
        numbers: dict[Future[R], int] = {pool.submit(_run, task): number for number, task in enumerate(tasks)}
        with progress(what, sum(sizes), unit) as advance:
            for future in as_completed(numbers):
                number = numbers[future]
                results[number] = future.result()
                advance(sizes[number])
    except BrokenProcessPool:
        raise InputError(
            f"{what}: a process was killed, perhaps for want of memory: run the command again, with fewer --processes"
        ) from None
    except MemoryError:
        raise InputError(f"{what}: there is not enough memory: run the command again, with fewer --processes") from None
    except OSError as error:
        raise InputError(f"{what}: {error}: see to it and run the command again, it goes on where it stopped") from None
    finally:
        pool.shutdown(cancel_futures=True)
        _work.clear()
    return results  # type: ignore[return-value]  # all are done


def _start(parent: int) -> None:
    """Leaves Ctrl-C to the parent, and ends when that is gone: a pool's processes would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(task: Any) -> Any:
    return _work[0](task)
