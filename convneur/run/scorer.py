"""The evaluations of a run in progress, each of its raw and of its averaged weights."""

from collections.abc import Iterator
from dataclasses import dataclass

from convneur.data.stream.batch import EvalBatch
from convneur.data.stream.eval import EvalLoader
from convneur.engine.engine import Weights
from convneur.engine.state import gather_model
from convneur.models.convneur.gates import watched_gates
from convneur.monitoring.watchdog import Watchdog
from convneur.records.log import TrainingLog
from convneur.records.retention import Best
from convneur.run.trainer import Trainer
from convneur.system.stopping import StopRequest
from convneur.system.world import World
from convneur.tasks.metrics import Metric
from convneur.tasks.task import Scores, Task


@dataclass(frozen=True)
class Evaluation:
    """Scores of the weights after a number of steps."""

    step: int
    raw: Scores
    averaged: Scores | None

    def best(self, metric: Metric) -> Best:
        """The better of the two scores."""
        raw = self.raw.values[metric.name]
        averaged = self.averaged.values[metric.name] if self.averaged else raw
        if metric.rank(averaged) > metric.rank(raw):
            return Best(self.step, averaged, "averaged", metric.name)
        return Best(self.step, raw, "raw", metric.name)


class Scorer:
    """Evaluates the weights that are in training, and says how they do.

    Args:
        task: builds the model, and says how good it is.
        world: this process among the ranks.
        loader: this rank's share of the held-out images.
        images: held-out images there are.
        trainer: whose weights are evaluated.
        log: takes the scores.
        watchdog: gets the time that an evaluation needs.
        stop_request: ends an evaluation.

    Attributes:
        newest: the newest evaluation since this start of the run; None before the first.
    """

    def __init__(
        self,
        task: Task,
        world: World,
        loader: EvalLoader,
        images: int,
        trainer: Trainer,
        log: TrainingLog,
        watchdog: Watchdog,
        stop_request: StopRequest,
    ) -> None:
        self._task, self._device = task, world.device
        self._loader, self._images, self._trainer = loader, images, trainer
        self._log, self._watchdog, self._stop_request = log, watchdog, stop_request
        self.newest: Evaluation | None = None

    def evaluate(self, done: int) -> Evaluation:
        """Evaluates the weights as they are after `done` steps. Collective.

        Raises StopNow where a signal ends it.
        """
        ema = self._trainer.ema
        with self._log.paused(), self._watchdog.paused():
            raw, gates = self._score(gather_model(self._trainer.engine))
            averaged = self._score(ema.full_model())[0] if ema else None
        self._log.scores(done, raw, averaged, gates)
        self.newest = Evaluation(done, raw, averaged)
        for line in raw.warnings:
            self._log.say(f"warning: {line}")
        for line in averaged.faults if averaged else ():
            self._log.say(f"warning: of the averaged weights, {line}")
        return self.newest

    def _score(self, weights: Weights) -> tuple[Scores, dict[str, float]]:
        """Scores whole weights in a model of its own, so that evaluation can't touch the one in training.

        Also returns the statistics of the gates in this rank's first batch.
        """
        model = self._task.build_model().to(self._device)
        model.load_state_dict(weights)
        with watched_gates(model) as gates:
            scores = self._task.evaluate(model, self._batches(), self._images)
        return scores, gates

    def _batches(self) -> Iterator[EvalBatch]:
        """What is evaluated, as many batches on every rank. A signal ends it, and each has the watchdog's time."""
        batches = iter(self._loader)
        while True:
            with self._stop_request.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self._watchdog.step()
            self._stop_request.check()
