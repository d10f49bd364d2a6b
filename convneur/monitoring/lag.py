"""Ranks that lag: how long each works, or waits for its data, while no other can keep it waiting."""

import socket
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from convneur.engine.engine import Engine
from convneur.system.world import World

LAG, LAG_STEPS = 1.5, 10
"""How many times the time that the others take makes a rank a slow one, and over how many steps at least."""


class OwnTime:
    """Seconds in which a rank works, or waits for its data, while no other can keep it waiting.

    That is its forward passes, unless ZeRO 3 fetches weights in them. What it waits for in collectives tells of others.
    On a GPU, events mark the time, and nobody waits for them.
    """

    def __init__(self, engine: Engine, world: World) -> None:
        self._world = world
        self.seconds, self._steps = 0.0, 0
        self._events: list[tuple[Any, Any]] = []
        engine.around_forward(self._start, self._stop)

    def _mark(self) -> Any:
        if self._world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self) -> None:
        self._started = self._mark()

    def _stop(self) -> None:
        self._events.append((self._started, self._mark()))

    def lag(self, steps: int) -> str | None:
        """Names the slowest rank if it is a slow one; `steps` steps were made since the last call. Collective."""
        self._steps += steps
        if self._steps < LAG_STEPS:
            return None
        for start, stop in self._events:
            on_gpu = self._world.device.type == "cuda"
            self.seconds += start.elapsed_time(stop) / 1000 if on_gpu else stop - start
        told: list[tuple[float, str]] = [(0.0, "")] * self._world.size
        dist.all_gather_object(told, (self.seconds / self._steps, socket.gethostname()), self._world.control)
        self.seconds, self._steps, self._events = 0.0, 0, []
        (slowest, host), rank = max((entry, rank) for rank, entry in enumerate(told))
        others = [seconds for other, (seconds, _) in enumerate(told) if other != rank]
        if not others or slowest <= LAG * median(others):
            return None
        return (
            f"rank {rank} on {host} holds the others up: its data and forward passes take {slowest:.3g} s a step, "
            f"those of the others {median(others):.3g} s"
        )
