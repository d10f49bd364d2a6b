"""A run in progress: what the training loop calls beside the step. `convneur.run.build` puts it together."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from timm.scheduler.scheduler import Scheduler

from convneur.config import Config
from convneur.data.errors import InputError
from convneur.data.stream.batch import Batch, EvalBatch
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.on_device import Normalize
from convneur.data.stream.train import TrainLoader
from convneur.engine.build import Weights, engine_settings
from convneur.engine.ema import Ema
from convneur.engine.state import gather, steps_made
from convneur.errors import NonFiniteError, SaveError
from convneur.models.convneur.model import ConvNeur
from convneur.monitoring.bad_samples import BadSampleCount
from convneur.monitoring.gauges import Gauges, watched_gates
from convneur.monitoring.guards import Guards
from convneur.monitoring.profiler import Profiler
from convneur.monitoring.watchdog import Watchdog
from convneur.records.checkpoint import (
    CHECKPOINTS,
    TrainState,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_intact,
    remove_obsolete,
    save_checkpoint,
)
from convneur.records.curves import plot_run
from convneur.records.metrics import TrainingLog
from convneur.records.retention import Best, Retention
from convneur.records.summary import Summary, write_summary
from convneur.system.agreement import led
from convneur.system.stopping import StopRequest
from convneur.system.world import World
from convneur.tasks.classification import Scores, evaluate
from convneur.tasks.mixing import DeviceTransform

LAST_TRIES, TRY_SECONDS = 10, 20.0
"""How often, and how far apart, a checkpoint is tried that there will be no other chance for: 3 minutes.

A batch job has 5 between the notice and the loss of its nodes.
"""


@dataclass(frozen=True)
class Evaluation:
    """Scores of the weights after a number of steps."""

    step: int
    raw: Scores
    averaged: Scores | None

    @property
    def best(self) -> Best:
        """The better of the two accuracies."""
        if self.averaged and self.averaged.top1 > self.raw.top1:
            return Best(self.step, self.averaged.top1, "averaged")
        return Best(self.step, self.raw.top1, "raw")


@dataclass
class Run:
    """What one rank holds of a run in progress.

    `best` is the best evaluation among those whose weights a checkpoint holds, `evaluated` the newest of all.
    """

    config: Config
    world: World
    folder: Path
    loader: TrainLoader
    bad_samples: BadSampleCount
    eval_loader: EvalLoader
    eval_images: int
    classes: tuple[str, ...]
    prepare: DeviceTransform
    normalize: Normalize
    autocast: torch.autocast
    engine: DeepSpeedEngine
    schedule: Scheduler
    ema: Ema | None
    log: TrainingLog
    guards: Guards
    gauges: Gauges
    profiler: Profiler | None
    stop_request: StopRequest
    watchdog: Watchdog
    start_step: int
    seconds_before: float
    best: Best | None
    went_back: bool
    started: float
    done: int
    saved: int
    evaluated: Evaluation | None = None
    save_at_once: bool = False

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.schedule.epochs * self.loader.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        """Learning rate that the optimizer is set to; under muP the one before a group's own scale."""
        group = self.engine.basic_optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))

    @property
    def seconds(self) -> float:
        """Time spent on this run, over all its starts."""
        return self.seconds_before + time.monotonic() - self.started

    def steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """The optimizer steps that remain, each with this rank's micro-batches. Collective.

        Raises:
            InputError: samples can't be read; on all ranks alike where those are too many.
        """
        for step, batches in enumerate(self._read(), self.start_step):
            yield step, batches
            self.watchdog.step()
            if self.profiler:
                self.profiler.step()
            if self._is_reported(step + 1):
                for line in self.bad_samples.update():
                    self.log.say(f"warning: replaced in training: {line}")
                self.bad_samples.check()

    def _read(self) -> Iterator[list[Batch]]:
        """What the loader has for the steps that remain; gauges and guards are told how long each took to come."""
        loaded = self.loader.iterate(self.start_step, self.total_steps)
        while True:
            start = time.perf_counter()
            with self.stop_request.waiting():
                batches = next(loaded, None)
            if batches is None:
                return
            waited = time.perf_counter() - start
            self.gauges.add_wait(waited)
            self.guards.add_wait(waited)
            yield batches

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        run = self.config.run
        periods = run.keep_every_steps, run.keep_every_epochs * self.loader.steps_per_epoch
        return Retention(run.keep_checkpoints, tuple(period for period in periods if period), run.keep_best)

    def _is_reported(self, done: int) -> bool:
        return done % self.config.run.log_every_steps == 0 or done == self.total_steps

    def guard_if_due(self, done: int) -> None:
        """Looks, whenever a line of metrics is due, at what the guards have found; goes back if need be. Collective.

        Raises:
            CorruptionError: the ranks' weights differ.
            NonFiniteError: the steps are bad, and the run has gone back before or can't.
        """
        self.guards.compare_weights(done)
        latest = self.guards.review() if self._is_reported(done) else None
        if latest is None:
            return
        bad = f"{self.config.guards.max_bad_steps} bad steps in a row from step {latest} on"
        if self.went_back:
            raise NonFiniteError(f"{bad}, and the run has gone back once already; a lower learning rate may help")
        before = [c for c in list_checkpoints(self.folder / CHECKPOINTS) if checkpoint_step(c) <= latest]
        checkpoint, _ = newest_intact(before, self.world)
        if checkpoint is None:
            raise NonFiniteError(f"{bad}, and there is no checkpoint from before them to go back to")
        load_checkpoint(checkpoint, self.engine, self.ema)
        self.went_back = True
        self.log.say(
            f"ALARM: {bad}: back to the weights of {checkpoint}; the samples of steps {checkpoint_step(checkpoint)} "
            f"to {done - 1} are passed over"
        )
        self.save_at_once = True

    def checkpoint_if_due(self, done: int, at_once: bool = False) -> None:
        """Saves a checkpoint every `checkpoint_every_steps` steps, where one shall be kept, at the end and at once.

        Collective. Where it can't be written the run goes on, and the log says so. What no later one can make up for is
        tried several times: somebody may make room.

        Raises:
            SaveError: the one at the run's end can't be written.
        """
        best = self._best_with(done)
        at_once, self.save_at_once = at_once or self.save_at_once, False
        due = done % self.config.run.checkpoint_every_steps == 0 or self.retention.for_good(done) or best != self.best
        if not due and done < self.total_steps and not at_once:
            return
        data, engine = self.loader.state(done), engine_settings(self.engine)
        state = TrainState(done, self.seconds, data, engine, best, self.went_back)
        last = done == self.total_steps
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
            self.folder / CHECKPOINTS,
            self.config,
            self.world,
            self.engine,
            self.ema,
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
        now = self.evaluated.best if self.evaluated and self.evaluated.step == done else None
        return now if now and (self.best is None or now.top1 > self.best.top1) else self.best

    def _warn(self, line: str) -> None:
        self.log.say(f"warning: {line}")

    def evaluate_if_due(self, done: int) -> None:
        """Evaluates the weights after every `eval_every_epochs` epochs, and after the last step."""
        if self._is_evaluated(done) or done == self.total_steps:
            self._evaluate(done)

    def evaluate_if_missed(self) -> None:
        """Makes the evaluation that this run was stopped or killed in, after the steps that it starts from."""
        if not self.start_step or not self._is_evaluated(self.start_step):
            return
        missed = [self.log.lacks_scores_at_start]
        dist.broadcast_object_list(missed, group=self.world.control)
        if missed[0]:
            self._evaluate(self.start_step)
            self.best = self._best_with(self.start_step)  # whose checkpoint is there

    def _is_evaluated(self, done: int) -> bool:
        return done % (self.config.run.eval_every_epochs * self.loader.steps_per_epoch) == 0 and done < self.total_steps

    def stop(self, signal: str) -> None:
        """Saves where the run stands, if it has made steps since it was saved, and says so. Collective."""
        if self.saved != self.done:
            self.checkpoint_if_due(self.done, at_once=True)
        line = f"stopped by {signal} after {self.done} of {self.total_steps} steps; --resume auto goes on"
        if self.saved != self.done:
            line += f" from step {self.saved}: the steps since could NOT be saved"
        self.log.say(line)

    def finish(self) -> Summary:
        """Draws the curves and writes the summary, of weights whose checkpoint is there. Collective.

        Raises NonFiniteError where no step has been made: those are the initial weights, and the run has no result.
        """
        if steps_made(self.engine) == 0:
            raise NonFiniteError(
                f"all {self.total_steps} steps were skipped, as their gradients were not finite: there is no result; "
                "mend the data or the settings, and train anew"
            )
        if self.evaluated is None or self.evaluated.step != self.total_steps:  # a start that had no step left to make
            self._evaluate(self.total_steps)
        assert self.evaluated is not None
        self.best = self._best_with(self.total_steps)
        with led(self.world):
            if self.world.is_main:
                remove_obsolete(self.folder / CHECKPOINTS, self.total_steps, self.retention, self.best, self._warn)
        raw, averaged = self.evaluated.raw, self.evaluated.averaged
        summary = Summary(
            top1=raw.top1,
            top1_ema=averaged.top1 if averaged else None,
            epochs=self.config.schedule.epochs,
            images=self.total_steps * self.config.data.global_batch_size,
            seconds=round(self.seconds, 1),
            checkpoint=str(self.folder / CHECKPOINTS / checkpoint_name(self.total_steps)),
        )
        with led(self.world):
            if self.world.is_main:
                write_summary(summary, self.folder)
                try:
                    plot_run(self.folder)
                except (OSError, InputError) as error:  # the run is finished all the same
                    self._warn(f"its curves can't be drawn ({error}); convneur plot {self.folder} does it later")
        return summary

    def _evaluate(self, done: int) -> None:
        with self.log.paused(), self.watchdog.paused():
            raw, gates = self._score(gather(self.engine))
            averaged = self._score(self.ema.full_weights())[0] if self.ema else None
        self.log.scores(done, raw, averaged, gates)
        self.evaluated = Evaluation(done, raw, averaged)
        for line in raw.warnings:
            self.log.say(f"warning: {line}")
        if averaged and averaged.not_finite:
            self.log.say(f"warning: of the averaged weights, {averaged.warnings[-1]}")

    def _score(self, weights: Weights) -> tuple[Scores, dict[str, float]]:
        """Scores whole weights in a model of its own, so that evaluation can't touch the one in training.

        Also returns the statistics of the gates in this rank's first batch.
        """
        model = ConvNeur(self.config.model).to(self.world.device)
        model.load_state_dict(weights)
        with watched_gates(model) as gates:
            scores = evaluate(model, self._eval_batches(), self.normalize, self.autocast, self.eval_images)
        return scores, gates

    def _eval_batches(self) -> Iterator[EvalBatch]:
        """What is evaluated, as many batches on every rank. A signal ends it, and each has the watchdog's time."""
        batches = iter(self.eval_loader)
        while True:
            with self.stop_request.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            self.watchdog.step()
            self.stop_request.check()
