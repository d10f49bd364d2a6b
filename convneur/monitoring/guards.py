"""Watching over a run: steps that aren't finite, losses that jump, ranks that lag, weights that differ.

Ranks that lag are in lag.py, sums of weights in checksums.py.

Nothing here waits for the device between two lines of metrics. What `Guards.observe` finds at each step stays on the
device until `Guards.review` looks at it.

**Gradients that aren't finite.** Once the ranks' gradients have been added up, a NaN of one rank is on all of them, so
all find the same. The engine leaves weights and optimizer state as they are, and its `skipped` says so.

**Losses that jump.** A loss is a spike if it lies above the median of up to `HISTORY` steps before it by more than
`guards.spike` standard deviations, estimated as 1.4826 times the median absolute deviation and as at least a hundredth
of the median. Spikes don't belong to the history.

**Going back.** After `guards.max_bad_steps` bad steps in a row, skipped ones and spikes, `review` names the last
checkpoint's step to go back to at the latest. The run takes weights, moments and averages from there, once, but neither
the learning rate nor the data, as PaLM was trained (arXiv 2204.02311, section 5.1): the samples since are passed over.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from convneur.data.stream.batch import Batch
from convneur.engine.ema import Ema
from convneur.engine.engine import Engine
from convneur.errors import CorruptionError
from convneur.models.convneur.overflow import overflowing_memory
from convneur.monitoring.checksums import difference
from convneur.monitoring.config import GuardConfig
from convneur.monitoring.lag import OwnTime
from convneur.system.world import World

HISTORY = 200
SHORTEST_HISTORY = 20
NAMED = 5
"""How many of the samples of a bad step are named."""


@dataclass(frozen=True)
class _Step:
    """What is known of step number `number`: its samples (of this rank), its loss (of this rank), and its flag."""

    number: int
    samples: Tensor
    loss: Tensor
    skipped: Tensor | bool


class Guards:
    """Watches one rank of a run.

    Args:
        config: its settings.
        world: this process among the ranks.
        engine: what is watched.
        ema: the averaged weights, if there are any.
        where: the name of a sample, by its number in the store.
        image_size: pixels a side of what is trained on.
        say: shows a line, on rank 0.
    """

    def __init__(
        self,
        config: GuardConfig,
        world: World,
        engine: Engine,
        ema: Ema | None,
        where: Callable[[int], str],
        image_size: int,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._world, self._engine, self._ema = config, world, engine, ema
        self._where, self._image_size, self._say = where, image_size, say
        self._steps: list[_Step] = []
        self._stretch: list[int] = []
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._own_time = OwnTime(engine, world)
        self.skipped = 0

    def observe(self, number: int, batches: list[Batch], loss: Tensor) -> None:
        """Takes in a step that has been made: its number, its samples and this rank's loss, still on the device."""
        indices = torch.cat([batch.indices for batch in batches])
        self._steps.append(_Step(number, indices, loss, self._engine.skipped))

    def add_wait(self, seconds: float) -> None:
        """Counts some seconds of this rank's waiting for its data as time of its own."""
        self._own_time.seconds += seconds

    def review(self) -> int | None:
        """Judges the steps since the last review, and says what is to be said of them. Collective.

        Returns:
            The step that a checkpoint may have at most to go back to it; None where there is no need.
        """
        if not self._steps:
            return None
        losses = torch.stack([step.loss for step in self._steps]).double()
        own = losses.isfinite().tolist()
        dist.all_reduce(losses)
        go_back = None
        for step, loss, finite in zip(self._steps, (losses / self._world.size).tolist(), own, strict=True):
            if go_back is None and self._is_bad(step, loss, finite):
                self._stretch.append(step.number)
                if len(self._stretch) >= self._config.max_bad_steps:
                    go_back = self._stretch[0]
            elif go_back is None:
                self._stretch = []
        if lag := self._own_time.lag(len(self._steps)):
            self._say(f"warning: {lag}")
        self._steps = []
        if go_back is not None:
            self._stretch = []
            self._losses.clear()
        return go_back

    def compare_weights(self, done: int) -> None:
        """Compares, where that is due after `done` steps, what every rank should hold alike. Collective.

        That is buffers; weights and averages under ZeRO 0 to 2; and the moments under ZeRO 0.

        Raises:
            CorruptionError: it differs; on all ranks alike.
        """
        if done % self._config.compare_every_steps or self._world.size == 1:
            return
        if fault := difference(self._replicated(), self._world):
            raise CorruptionError(f"after {done} steps {fault}; --resume auto goes on from the last checkpoint")

    def _replicated(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._engine.replicated()
        if self._ema:
            averages = self._ema.full_model() if self._engine.stage < 3 else self._ema.full_buffers()
            yield from ((f"the average of {name}", value) for name, value in averages.items())

    def _is_bad(self, step: _Step, loss: float, own_finite: bool) -> bool:
        if step.skipped:
            self.skipped += 1
            self._say(
                f"warning: step {step.number} was skipped: its gradients are not finite; "
                f"{self.skipped} skipped so far; {self._samples(step, own_finite)}{self._overflow()}"
            )
            return True
        limit = spike_limit(self._losses, self._config.spike)
        if loss > limit:
            self._say(
                f"warning: the loss of step {step.number} is {loss:.4g}, above {limit:.4g}, the limit that the "
                f"{len(self._losses)} steps before set; {self._samples(step, True)}"
            )
            return True
        self._losses.append(loss)
        return False

    def _overflow(self) -> str:
        """Names a memory that overflows with the present weights whatever it is shown; ZeRO 3 has no whole weights."""
        memory = overflowing_memory(self._engine.module, self._image_size) if self._engine.stage < 3 else None
        return f"; {memory} overflows on noise, too: its settings, or its weights, are the reason" if memory else ""

    def _samples(self, step: _Step, own_finite: bool) -> str:
        """Names the samples of the ranks whose loss isn't finite, of all ranks if there are none. Collective."""
        told: list[tuple[bool, list[str]]] = [(True, [])] * self._world.size
        mine = [self._where(index) for index in step.samples.tolist()]
        dist.all_gather_object(told, (own_finite, mine), self._world.control)
        suspects = [names for finite, names in told if not finite] or [names for _, names in told]
        names = [name for part in suspects for name in part]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"its samples are {', '.join(names[:NAMED])}{more}"


def spike_limit(losses: deque[float] | list[float], deviations: float) -> float:
    """The loss above which a step is a spike; infinite while too few losses are known."""
    if len(losses) < SHORTEST_HISTORY:
        return math.inf
    middle = median(losses)
    deviation = 1.4826 * median(abs(loss - middle) for loss in losses)
    return middle + deviations * max(deviation, 0.01 * abs(middle))
