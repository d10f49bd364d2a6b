"""The checkpoints of a run in progress: when one is made, which of them stay, and going back to one."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from convneur.config import Config
from convneur.data.stream.train import TrainLoader
from convneur.errors import NonFiniteError, SaveError
from convneur.monitoring.watchdog import Watchdog
from convneur.records.checkpoint import TrainState, save_checkpoint
from convneur.records.listing import checkpoint_step, list_checkpoints
from convneur.records.log import TrainingLog
from convneur.records.manifest import newest_intact
from convneur.records.retention import Best, Retention
from convneur.records.upkeep import remove_obsolete
from convneur.run.resume import Position
from convneur.run.trainer import Trainer
from convneur.system.agreement import led
from convneur.system.world import World
from convneur.tasks.metrics import Metric

LAST_TRIES, TRY_SECONDS = 10, 20.0
"""How often, and how far apart, a checkpoint is tried that there will be no other chance for: 3 minutes.

A batch job has 5 between the notice and the loss of its nodes.
"""


@dataclass
class Keeper:
    """Keeps the checkpoints of a run.

    Attributes:
        folder: of the run's checkpoints.
        config: the run's.
        world: this process among the ranks.
        trainer: what is saved.
        loader: whose position is saved.
        classes: names of the classes, in the order of the logits.
        metric: decides which evaluation is the best.
        log: is told of what can't be saved.
        watchdog: gets the time that saving needs.
        position: where this start of the run goes on.
        started: when it began, by the monotonic clock.
        saved: steps made by the newest checkpoint; -1 where the run has none of its own.
        best: the best evaluation among those whose weights a checkpoint holds; None where it isn't to be kept.
        went_back: whether the run has gone back to a checkpoint once.
    """

    folder: Path
    config: Config
    world: World
    trainer: Trainer
    loader: TrainLoader
    classes: tuple[str, ...]
    metric: Metric
    log: TrainingLog
    watchdog: Watchdog
    position: Position
    started: float
    saved: int = field(init=False)
    best: Best | None = field(init=False)
    went_back: bool = field(init=False)
    _evaluated: Best | None = field(default=None, init=False)
    _save_at_once: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Takes over what the checkpoint knows that the run goes on from."""
        position, state = self.position, self.position.state
        self.saved = position.step if position.own or not state else -1
        self.best, self.went_back = position.best, bool(state and state.went_back)

    @property
    def seconds(self) -> float:
        """Time spent on this run, over all its starts."""
        before = self.position.state.seconds if self.position.state else 0.0
        return before + time.monotonic() - self.started

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        run = self.config.run
        periods = run.keep_every_steps, run.keep_every_epochs * self.loader.steps_per_epoch
        return Retention(run.keep_checkpoints, tuple(period for period in periods if period), run.keep_best)

    def consider(self, evaluated: Best, *, saved: bool) -> None:
        """Takes in an evaluation, which may be the best; `saved` says that a checkpoint holds its weights already."""
        self._evaluated = evaluated
        if saved:
            self.best = self._best_with(evaluated.step)

    def save_if_due(self, done: int, at_once: bool = False) -> None:
        """Saves a checkpoint every `checkpoint_every_steps` steps, where one shall be kept, at the end and at once.

        Collective. Where it can't be written the run goes on, and the log says so. What no later one can make up for is
        tried several times: somebody may make room.

        Raises:
            SaveError: the one at the run's end can't be written.
        """
        best = self._best_with(done)
        at_once, self._save_at_once = at_once or self._save_at_once, False
        due = done % self.config.run.checkpoint_every_steps == 0 or self.retention.for_good(done) or best != self.best
        last = done == self.config.schedule.epochs * self.loader.steps_per_epoch
        if not (due or last or at_once):
            return
        data, engine = self.loader.state(done), self.trainer.engine.settings
        state = TrainState(done, self.seconds, data, engine, best, self.went_back)
        with self.log.paused(), self.watchdog.paused():
            for left in reversed(range(LAST_TRIES if last or at_once else 1)):
                try:
                    self._save(state)
                    return
                except SaveError as error:
                    if last and not left:
                        raise SaveError(f"at the run's end {error}; mend that, and use --resume auto") from error
                    then = f"; {left} more tries, {TRY_SECONDS:.0f} s apart" if left else ""
                    self.log.say(f"ALARM: after {done} steps {error}; the checkpoints before stay{then}")
                    time.sleep(TRY_SECONDS if left else 0)

    def _save(self, state: TrainState) -> None:
        save_checkpoint(
            self.folder,
            self.config,
            self.world,
            self.trainer.engine,
            self.trainer.ema,
            state,
            self.retention,
            self.classes,
            self._warn,
        )
        self.best, self.saved = state.best, state.step

    def _best_with(self, done: int) -> Best | None:
        """The best evaluation if the weights after `done` steps are saved; always None where it isn't to be kept."""
        if not self.config.run.keep_best:
            return None
        now = self._evaluated if self._evaluated and self._evaluated.step == done else None
        better = now and (self.best is None or self.metric.rank(now.score) > self.metric.rank(self.best.score))
        return now if better else self.best

    def go_back(self, latest: int, done: int) -> None:
        """Takes weights, moments and average from the newest checkpoint of at most `latest` steps. Collective.

        Raises:
            NonFiniteError: the run has gone back before, or there is no such checkpoint.
        """
        bad = f"{self.config.guards.max_bad_steps} bad steps in a row from step {latest} on"
        if self.went_back:
            raise NonFiniteError(f"{bad}, and the run has gone back once already; a lower learning rate may help")
        before = [checkpoint for checkpoint in list_checkpoints(self.folder) if checkpoint_step(checkpoint) <= latest]
        checkpoint, _ = newest_intact(before, self.world)
        if checkpoint is None:
            raise NonFiniteError(f"{bad}, and there is no checkpoint from before them to go back to")
        self.trainer.load(checkpoint)
        self.went_back = True
        self.log.say(
            f"ALARM: {bad}: back to the weights of {checkpoint}; the samples of steps {checkpoint_step(checkpoint)} "
            f"to {done - 1} are passed over"
        )
        self._save_at_once = True

    def clean_up(self, done: int) -> None:
        """Removes what need not stay beside the checkpoint after `done` steps, which is there. Collective."""
        with led(self.world):
            if self.world.is_main:
                remove_obsolete(self.folder, done, self.retention, self.best, self._warn)

    def _warn(self, line: str) -> None:
        self.log.say(f"warning: {line}")
