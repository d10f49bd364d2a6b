"""Stopping on a signal: noticed by any rank, agreed on by all between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self, cast

import torch
import torch.distributed as dist

# A scheduler sends TERM when it takes a machine away, and, asked to, USR2 ahead of a time limit. USR1 is NCCL's.
# INT is Ctrl-C's; HUP comes when a terminal is closed, unless nohup has it ignored.
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopNow(Exception):  # noqa: N818 - not an error
    """Raised where what is under way is given up, because a signal has asked the run to stop.

    Attributes:
        signal: its name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.signal = name


class StopRequest:
    """Remembers the first signal to stop that this process gets, instead of dying of it.

    The ranks talk about it in a group of their own on the CPU, and while they make the next step, so that no step waits
    for the GPU or for a slower rank on its account.
    """

    def __init__(self) -> None:
        self._received = 0
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # every rank is in it
        self._answer: tuple[torch.Tensor, dist.Work] | None = None
        self._waiting = False

    def agreed(self) -> str | None:
        """The name of a signal that some rank had got by the last call, on all of them alike, or None. Collective."""
        answer = self._answer
        with torch.inference_mode(False):  # in an evaluation it is on
            received = torch.tensor(self._received)
        work = dist.all_reduce(received, dist.ReduceOp.MAX, self._group, async_op=True)
        self._answer = received, work
        if answer is None:
            return None
        number, asked = answer
        asked.wait()
        return signal.Signals(int(number)).name if number else None

    def check(self) -> None:
        """Raises StopNow, on all ranks alike, once some rank has got a signal. Collective."""
        if name := self.agreed():
            raise StopNow(name)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for something that may never come: a signal ends it by StopNow, if there is one rank.

        Of several, others may be in the middle of the step by now, and can't leave it.
        """
        self._waiting = dist.get_world_size() == 1
        try:
            if self._waiting and self._received:
                raise StopNow(signal.Signals(self._received).name)
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> Self:
        """Starts to listen for the signals."""
        heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._remember) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back their former effect."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = self._received or number
        if self._waiting:
            self._waiting = False
            raise StopNow(signal.Signals(number).name)
