"""What signals do to a process that starts others: it stops, leaving nothing behind."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""What stops a run."""

IGNORABLE = (signal.SIGHUP, signal.SIGTSTP)
"""Those that stay ignored where this process was started so, as nohup does it; an INT that is sent is meant."""


class StoppedError(Exception):
    """A signal has asked this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {name_of(number)}")
        self.status = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """A block that signals end by a StoppedError, for its tidying up to be done."""

    def stop(number: int, _: FrameType | None) -> None:
        raise StoppedError(number)

    with handling(dict.fromkeys(STOPPING, stop)):
        yield


@contextmanager
def handling(handlers: "Mapping[signal.Signals, signal._HANDLER]") -> Iterator[None]:
    """Handles signals in a block, but for those that are to stay ignored."""
    before = {number: signal.getsignal(number) for number in handlers}
    heeded = [n for n, handler in before.items() if not (n in IGNORABLE and handler == signal.SIG_IGN)]
    for number in heeded:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def name_of(number: int) -> str:
    """The name of a signal, such as SIGTERM."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
