"""How far a long piece of work has come: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10


class Advance(Protocol):
    """Takes it that `count` more are done."""

    def __call__(self, count: int) -> None:
        """Moves on."""


@contextmanager
def progress(task: str, total: int, unit: str) -> Iterator[Advance]:
    """Shows the progress of a block.

    Args:
        task: what is being done, such as "writing train".
        total: how many there are to do.
        unit: of what, such as "images".

    Yields:
        What to call as they get done.
    """
    console = Console(soft_wrap=True, highlight=False)
    start, done = time.monotonic(), 0

    def rate() -> float:
        return done / max(time.monotonic() - start, 1e-9)

    def line() -> None:
        left = timedelta(seconds=round((total - done) / rate())) if done else "?"
        console.print(f"{task}: {done:,} of {total:,} {unit}, {rate():,.0f} {unit}/s, {left} left")

    if console.is_terminal and not console.is_dumb_terminal:  # which can't move its cursor
        columns = (TextColumn(task), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            number = bar.add_task(task, total=total, rate="")

            def move(count: int) -> None:
                nonlocal done
                done += count
                bar.update(number, completed=done, rate=f"{rate():,.0f} {unit}/s")

            yield move
        return

    shown = start

    def tell(count: int) -> None:
        nonlocal done, shown
        done += count
        if time.monotonic() - shown >= LINE_SECONDS:
            shown = time.monotonic()
            line()

    yield tell
    line()
