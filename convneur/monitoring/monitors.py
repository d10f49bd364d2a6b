"""All who look on while a run trains, together."""

from collections.abc import Callable
from dataclasses import dataclass

from convneur.monitoring.bad_samples import BadSampleCount
from convneur.monitoring.gauges import Gauges
from convneur.monitoring.guards import Guards
from convneur.monitoring.profiler import Profiler
from convneur.monitoring.watchdog import Watchdog


@dataclass(frozen=True)
class Monitors:
    """Who looks on while a run trains; `profiler` is None where nobody has asked for it."""

    watchdog: Watchdog
    guards: Guards
    gauges: Gauges
    bad_samples: BadSampleCount
    profiler: Profiler | None

    def add_wait(self, seconds: float) -> None:
        """Takes in for how long this rank has waited for the data of a step."""
        self.gauges.add_wait(seconds)
        self.guards.add_wait(seconds)

    def step(self) -> None:
        """Says that a step was made."""
        self.watchdog.step()
        if self.profiler:
            self.profiler.step()

    def report_bad_samples(self, say: Callable[[str], None]) -> None:
        """Names the samples that the ranks could not read since the last call. Collective.

        Raises InputError, on all ranks alike, where they are too many.
        """
        for line in self.bad_samples.update():
            say(f"warning: replaced in training: {line}")
        self.bad_samples.check()

    def close(self) -> None:
        """Ends tracing, with what there is by then."""
        if self.profiler:
            self.profiler.close()
