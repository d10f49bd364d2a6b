"""A run in progress: what the training loop calls beside the step. `convneur.run.build` puts it together."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from convneur.config import Config
from convneur.data.errors import InputError
from convneur.data.stream.batch import Batch
from convneur.data.stream.train import TrainLoader
from convneur.engine.state import steps_made
from convneur.errors import NonFiniteError
from convneur.monitoring.monitors import Monitors
from convneur.records.folder import CHECKPOINTS
from convneur.records.listing import checkpoint_name
from convneur.records.log import TrainingLog
from convneur.records.summary import Summary, write_summary
from convneur.run.keeper import Keeper
from convneur.run.scorer import Scorer
from convneur.run.trainer import Trainer
from convneur.system.agreement import led
from convneur.system.stopping import StopRequest
from convneur.system.world import World
from convneur.tasks.task import Task


@dataclass
class Run:
    """What one rank holds of a run in progress.

    Attributes:
        config: what is trained.
        world: this process among the ranks.
        folder: the run's.
        task: what it trains for.
        loader: this rank's training samples.
        trainer: what a step changes.
        monitors: who looks on.
        scorer: evaluates.
        keeper: makes and keeps the checkpoints.
        log: takes metrics and lines.
        stop_request: whether a signal has asked the run to stop.
        done: optimizer steps made; at first those that this start goes on from.
    """

    config: Config
    world: World
    folder: Path
    task: Task
    loader: TrainLoader
    trainer: Trainer
    monitors: Monitors
    scorer: Scorer
    keeper: Keeper
    log: TrainingLog
    stop_request: StopRequest
    done: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.schedule.epochs * self.loader.steps_per_epoch

    def steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """The optimizer steps that remain, each with this rank's micro-batches. Collective.

        Raises:
            InputError: samples can't be read; on all ranks alike where those are too many.
        """
        for step, batches in enumerate(self._read(), self.done):
            yield step, batches
            self.monitors.step()
            if self._is_reported(step + 1):
                self.monitors.report_bad_samples(self.log.say)

    def _read(self) -> Iterator[list[Batch]]:
        """What the loader has for the steps that remain; the monitors are told how long each took to come."""
        loaded = self.loader.iterate(self.done, self.total_steps)
        while True:
            start = time.perf_counter()
            with self.stop_request.waiting():
                batches = next(loaded, None)
            if batches is None:
                return
            self.monitors.add_wait(time.perf_counter() - start)
            yield batches

    def _is_reported(self, done: int) -> bool:
        return done % self.config.run.log_every_steps == 0 or done == self.total_steps

    def guard_if_due(self, done: int) -> None:
        """Looks, whenever a line of metrics is due, at what the guards have found; goes back if need be. Collective.

        Raises:
            CorruptionError: the ranks' weights differ.
            NonFiniteError: the steps are bad, and the run has gone back before or can't.
        """
        self.monitors.guards.compare_weights(done)
        latest = self.monitors.guards.review() if self._is_reported(done) else None
        if latest is not None:
            self.keeper.go_back(latest, done)

    def evaluate_if_due(self, done: int) -> None:
        """Evaluates the weights after every `eval_every_epochs` epochs, and after the last step."""
        if self._is_evaluated(done) or done == self.total_steps:
            self._evaluate(done)

    def evaluate_if_missed(self) -> None:
        """Makes the evaluation that this run was stopped or killed in, after the steps that it starts from."""
        if not self.done or not self._is_evaluated(self.done):
            return
        missed = [self.log.lacks_scores_at_start]
        dist.broadcast_object_list(missed, group=self.world.control)
        if missed[0]:
            self._evaluate(self.done, saved=True)

    def _is_evaluated(self, done: int) -> bool:
        return done % (self.config.run.eval_every_epochs * self.loader.steps_per_epoch) == 0 and done < self.total_steps

    def _evaluate(self, done: int, *, saved: bool = False) -> None:
        self.keeper.consider(self.scorer.evaluate(done).best(self.task.metrics[0]), saved=saved)

    def save_unsaved(self) -> None:
        """Saves where the run stands, if it has made steps since it was saved. Collective."""
        if self.keeper.saved != self.done:
            self.keeper.save_if_due(self.done, at_once=True)

    def stop(self, signal: str) -> None:
        """Does so at a signal, and says from where the run goes on. Collective."""
        self.save_unsaved()
        line = f"stopped by {signal} after {self.done} of {self.total_steps} steps; --resume auto goes on"
        if self.keeper.saved != self.done:
            line += f" from step {self.keeper.saved}: the steps since could NOT be saved"
        self.log.say(line)

    def finish(self) -> Summary:
        """Draws the curves and writes the summary, of weights whose checkpoint is there. Collective.

        Raises NonFiniteError where no step has been made: those are the initial weights, and the run has no result.
        """
        if steps_made(self.trainer.engine) == 0:
            raise NonFiniteError(
                f"all {self.total_steps} steps were skipped, as their gradients were not finite: there is no result; "
                "mend the data or the settings, and train anew"
            )
        newest = self.scorer.newest
        if newest is None or newest.step != self.total_steps:  # a start that had no step left to make
            newest = self.scorer.evaluate(self.total_steps)
        metric = self.task.metrics[0]
        self.keeper.consider(newest.best(metric), saved=True)
        self.keeper.clean_up(self.total_steps)
        summary = Summary(
            score=newest.raw.values[metric.name],
            score_ema=newest.averaged.values[metric.name] if newest.averaged else None,
            epochs=self.config.schedule.epochs,
            images=self.total_steps * self.config.data.global_batch_size,
            seconds=round(self.keeper.seconds, 1),
            checkpoint=str(self.folder / CHECKPOINTS / checkpoint_name(self.total_steps)),
            metric=metric.name,
        )
        with led(self.world):
            if self.world.is_main:
                self._write(summary)
        return summary

    def _write(self, summary: Summary) -> None:
        from convneur.records.curves import plot_run  # with matplotlib, which takes a second: only one rank draws

        write_summary(summary, self.folder)
        try:
            plot_run(self.folder)
        except (OSError, InputError) as error:  # the run is finished all the same
            line = f"its curves can't be drawn ({error}); convneur plot {self.folder} does it later"
            self.log.say(f"warning: {line}")
