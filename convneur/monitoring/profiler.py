"""`convneur train --profile`: what a few steps spend their time on."""

from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from convneur.system.world import World

FIRST, STEPS = 5, 3  # steps are left out until caches are warm and algorithms chosen
ROWS = 15


class Profiler:
    """Traces steps FIRST to FIRST + STEPS - 1 of a start on rank 0, then writes the trace and prints a table.

    Args:
        path: where the trace goes, for chrome://tracing or ui.perfetto.dev.
        world: this process among the ranks.
        say: shows a line, on rank 0.
    """

    def __init__(self, path: Path, world: World, say: Callable[[str], None]) -> None:
        self._say, self._path = say, path
        self._on_gpu = world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = (
            profile(
                activities=activities,
                schedule=schedule(wait=FIRST - 1, warmup=1, active=STEPS, repeat=1),
                on_trace_ready=self._report,
            )
            if world.is_main
            else None
        )
        if self._profile:
            self._profile.start()

    def step(self) -> None:
        """Says that a step is made."""
        if self._profile:
            self._profile.step()

    def close(self) -> None:
        """Ends tracing, with what there is by then."""
        if self._profile:
            self._profile.stop()

    def _report(self, done: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._path))
        key = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        events = [event for event in done.key_averages() if not event.key.startswith("ProfilerStep")]
        events.sort(key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in events) or 1
        self._say(f"{STEPS} steps by {'GPU' if self._on_gpu else 'CPU'} time, of rank 0; the trace is {self._path}")
        self._say(f"{'share':>6}  {'ms a step':>9}  {'calls':>7}  kernel")
        for event in events[:ROWS]:
            time = getattr(event, key)
            self._say(f"{time / total:>6.1%}  {time / 1e3 / STEPS:>9.2f}  {event.count // STEPS:>7}  {event.key[:80]}")
