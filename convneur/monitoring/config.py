"""When a run helps itself, and when it ends."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardConfig:
    """When a run helps itself, and when it stops.

    Attributes:
        max_bad_steps: this many steps in a row whose gradients aren't finite, or whose loss jumps, send the run back to
            the last checkpoint before them, once; the second time it stops.
        spike: how many standard deviations above the median a loss is a jump.
        compare_every_steps: optimizer steps between two comparisons of the weights that ranks hold in common.
    """

    max_bad_steps: int = 10
    spike: float = 10.0
    compare_every_steps: int = 1000


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as hanging.

    Attributes:
        seconds: most seconds from one step to the next; 0 for no watchdog.
        long_seconds: the same for what takes its time: start and first step with their compilers, evaluation,
            checkpoints.
    """

    seconds: float = 180.0
    long_seconds: float = 1800.0
