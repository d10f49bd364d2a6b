"""A run: what the training loop uses, how it is put together, resumed and finished."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from timm.scheduler.scheduler import Scheduler

from convneur.bad_samples import BadSampleCount
from convneur.checkpoint import (
    CONFIG_FILE,
    TrainState,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_intact,
    read_state,
    remove_obsolete,
    save_checkpoint,
)
from convneur.config import Config, load_config, save_config
from convneur.data.engine import build_train_loader
from convneur.data.errors import InputError
from convneur.data.loader import Batch, EvalLoader, TrainLoader
from convneur.data.mixing import DeviceTransform, Normalize
from convneur.data.store import open_store
from convneur.deepspeed_config import deepspeed_config, offloads_optimizer
from convneur.determinism import set_determinism
from convneur.ema import Ema
from convneur.engine import Weights, autocast, build_engine, use_apex_norms, zero_stage
from convneur.engine_state import gather
from convneur.errors import NonFiniteError, SaveError
from convneur.evaluate import Scores, evaluate
from convneur.gauges import Gauges, step_flops, watched_gates
from convneur.guards import Guards
from convneur.metrics import TrainingLog
from convneur.model import ConvNeur
from convneur.optim import build_optimizer, build_schedule, choose_implementation
from convneur.plot import plot_run
from convneur.profiling import Profiler
from convneur.reproduce import REPRODUCE_FILE, differences, read_record, record, write_record
from convneur.retention import Best, Retention
from convneur.stopping import StopRequest
from convneur.summary import SUMMARY_FILE, Summary, write_summary
from convneur.watchdog import Watchdog
from convneur.world import World

CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """What one rank holds of a run in progress."""

    config: Config
    world: World
    folder: Path
    loader: TrainLoader
    bad_samples: BadSampleCount
    eval_loader: EvalLoader
    eval_images: int
    prepare: DeviceTransform
    normalize: Normalize
    autocast: torch.autocast
    engine: DeepSpeedEngine
    optimizer: torch.optim.Optimizer
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
    started: float = field(default_factory=time.monotonic)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.schedule.epochs * self.loader.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        """Learning rate that the optimizer is set to; under muP the one before a group's own scale."""
        group = self.optimizer.param_groups[0]
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
        read = self.gauges.waiting(self.guards.timed(self.loader.iterate(self.start_step, self.total_steps)))
        for step, batches in enumerate(read, self.start_step):
            yield step, batches
            self.watchdog.step()
            if self.profiler:
                self.profiler.step()
            if self._is_reported(step + 1):
                for line in self.bad_samples.update():
                    self.log.say(f"warning: replaced in training: {line}")
                self.bad_samples.check()

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
        self.checkpoint_if_due(done, at_once=True)

    def checkpoint_if_due(self, done: int, at_once: bool = False) -> None:
        """Saves a checkpoint every `checkpoint_every_steps` steps, where one shall be kept, at the end and at once.

        Collective. Where it can't be written the run goes on, unless it is at its end; the log says so.
        """
        best = self.config.run.keep_best and self.best is not None and self.best.step == done
        due = done % self.config.run.checkpoint_every_steps == 0 or self.retention.for_good(done) or best
        if not due and done < self.total_steps and not at_once:
            return
        engine = engine_settings(self.engine, self.config)
        state = TrainState(done, self.seconds, self.loader.state(done), engine, self.best, self.went_back)
        with self.log.paused(), self.watchdog.paused():
            try:
                save_checkpoint(
                    self.folder / CHECKPOINTS, self.config, self.world, self.engine, self.ema, state, self.retention
                )
            except SaveError as error:
                if done == self.total_steps:
                    raise
                self.log.say(f"ALARM: after {done} steps {error}; the checkpoints before stay")

    def evaluate_if_due(self, done: int) -> None:
        """Evaluates the weights after every `eval_every_epochs` epochs; those of the last step are `finish`'s."""
        if done % (self.config.run.eval_every_epochs * self.loader.steps_per_epoch) == 0 and done < self.total_steps:
            self._evaluate(done)

    def finish(self) -> Summary:
        """Evaluates the final weights, draws the curves and writes the summary. Collective."""
        raw, averaged = self._evaluate(self.total_steps)
        if self.world.is_main:
            remove_obsolete(self.folder / CHECKPOINTS, self.total_steps, self.retention, self.best)
        summary = Summary(
            top1=raw.top1,
            top1_ema=averaged.top1 if averaged else None,
            epochs=self.config.schedule.epochs,
            images=self.total_steps * self.config.data.global_batch_size,
            seconds=round(self.seconds, 1),
            checkpoint=str(list_checkpoints(self.folder / CHECKPOINTS)[0]),
        )
        if self.world.is_main:
            plot_run(self.folder)
            write_summary(summary, self.folder)
        dist.barrier()
        return summary

    def _evaluate(self, done: int) -> tuple[Scores, Scores | None]:
        with self.log.paused(), self.watchdog.paused():
            raw, gates = self._score(gather(self.engine))
            averaged = self._score(self.ema.full_weights())[0] if self.ema else None
        self.log.scores(done, raw, averaged, gates)
        now = Best(done, raw.top1, "raw")
        if averaged and averaged.top1 > raw.top1:
            now = Best(done, averaged.top1, "averaged")
        if self.best is None or now.top1 > self.best.top1:
            self.best = now
        for line in raw.bad:
            self.log.say(f"warning: left out of the evaluation: {line}")
        return raw, averaged

    def _score(self, weights: Weights) -> tuple[Scores, dict[str, float]]:
        """Scores whole weights in a model of its own, so that evaluation can't touch the one in training.

        Also returns the statistics of the gates in this rank's first batch.
        """
        model = ConvNeur(self.config.model).to(self.world.device)
        model.load_state_dict(weights)
        with watched_gates(model) as gates:
            scores = evaluate(model, self.eval_loader, self.normalize, self.autocast, self.eval_images)
        return scores, gates


@contextmanager
def started_run(config: Config, world: World, folder: Path, resume: str, profile: bool = False) -> Iterator[Run]:
    """A run at the position to start from; closes its files and lets go of signals, however the block ends.

    Collective; see `convneur.train.train` for what it takes and raises.
    """
    with StopRequest() as stop_request, Watchdog(config.watchdog, folder, world.rank) as watchdog:
        run = _start(config, world, folder, resume, stop_request, watchdog, profile)
        try:
            yield run
        finally:
            if run.profiler:
                run.profiler.close()
            run.log.close()


def _start(
    config: Config,
    world: World,
    folder: Path,
    resume: str,
    stop_request: StopRequest,
    watchdog: Watchdog,
    profile: bool,
) -> Run:
    """Builds everything a rank trains with."""
    started = time.monotonic()
    set_determinism(config.run.determinism)
    train_store = open_store(config.data, config.data.train_split)
    eval_store = open_store(config.data, config.data.val_split)
    loader = build_train_loader(
        config.data,
        train_store,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        accumulation=config.train.accumulation,
    )
    eval_loader = EvalLoader(config.data, eval_store, rank=world.rank, world_size=world.size)
    prepare = DeviceTransform(
        config.data,
        num_classes=config.model.num_classes,
        label_smoothing=config.train.label_smoothing,
        seed=config.run.seed,
        device=world.device,
    )

    torch.manual_seed(config.run.seed)  # the same initial weights on every rank
    model = ConvNeur(config.model).to(world.device)
    model.set_grad_checkpointing(config.train.recompute)
    if config.train.norm_implementation == "apex":
        use_apex_norms(model)
    parameters = sum(p.numel() for p in model.parameters())
    offload = offloads_optimizer(config.deepspeed)
    implementation = choose_implementation(config.optimizer, world.device.type, offload)
    optimizer = build_optimizer(model, config.optimizer, implementation, config.data.global_batch_size, offload)
    schedule = build_schedule(optimizer, config.schedule, loader.steps_per_epoch)
    engine = build_engine(model, optimizer, deepspeed_config(config, world.size), compile=config.train.compile)
    ema = Ema(engine, config.train.ema_decay) if config.train.ema_decay else None

    checkpoint, faults = choose_checkpoint(folder, resume, world)
    state = None
    if checkpoint:
        state = read_state(checkpoint)
        check_fit(checkpoint, config)
        loader.check_state(state.data)
        load_checkpoint(checkpoint, engine, ema)
    start_step = state.step if state else 0

    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_FILE)
        if start_step < config.schedule.epochs * loader.steps_per_epoch:
            (folder / SUMMARY_FILE).unlink(missing_ok=True)  # of a shorter run that is now to be longer
        made_with = record(config, world.size)
        changed = differences(read_record(folder), made_with) if state and (folder / REPRODUCE_FILE).exists() else []
        if not state:
            write_record(folder, made_with)
    log = TrainingLog(
        folder,
        world,
        start_step=start_step,
        total_steps=config.schedule.epochs * loader.steps_per_epoch,
        steps_per_epoch=loader.steps_per_epoch,
        images_per_step=config.data.global_batch_size,
        every_steps=config.run.log_every_steps,
        wandb_project=config.run.wandb_project,
    )
    guards = Guards(config.guards, world, engine, ema, train_store.where, log.say)
    flops = step_flops(config.model, config.data.image_size)
    for fault in faults:
        log.say(f"warning: damaged checkpoint left out: {fault}")
    if world.is_main:
        for line in changed:
            log.say(f"warning: changed since the run was started: {line}")
    if state:
        log.say(f"resuming from {checkpoint}, {start_step} of {log.total_steps} steps made")
        if state.engine != (settings := engine_settings(engine, config)):
            log.say(
                f"resuming {_in_words(state.engine)} as {_in_words(settings)}: weights, moments and averages are equal "
                "to the bit, the steps to come are not: sums run in another order"
            )
    if warning := config.model.depth_warning:
        log.say(f"warning: {config.model.variant} has {warning}")
    log.say(
        f"{config.model.variant}: {parameters / 1e6:.2f} M parameters, "
        f"{world.size} x {world.device.type}, ZeRO {zero_stage(engine)}, "
        f"{config.optimizer.name} of {implementation}, {len(train_store):,} training images, "
        f"{loader.steps_per_epoch} steps an epoch, {flops / 1e9:.3g} GFLOPs to train on an image"
    )
    return Run(
        config=config,
        world=world,
        folder=folder,
        loader=loader,
        bad_samples=BadSampleCount(config.data, len(train_store), loader.bad_samples, world.device),
        eval_loader=eval_loader,
        eval_images=len(eval_store),
        prepare=prepare,
        normalize=Normalize(config.data, world.device),
        autocast=autocast(config.deepspeed, world.device),
        engine=engine,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        log=log,
        guards=guards,
        gauges=Gauges(world, flops, guards.gradient_norm, loader.bad_samples),
        profiler=Profiler(folder, world, log.say) if profile else None,
        stop_request=stop_request,
        watchdog=watchdog,
        start_step=start_step,
        seconds_before=state.seconds if state else 0.0,
        best=state.best if state else None,
        went_back=state.went_back if state else False,
        started=started,
    )


def engine_settings(engine: DeepSpeedEngine, config: Config) -> dict[str, Any]:
    """The settings that the order of summation depends on, and so the last bits of a step."""
    return {
        "zero_stage": zero_stage(engine),
        "world_size": dist.get_world_size(),
        "accumulation": config.train.accumulation,
    }


def _in_words(settings: dict[str, Any]) -> str:
    accumulated = f", {settings['accumulation']} micro-batches" if settings["accumulation"] > 1 else ""
    return f"{settings['world_size']} x ZeRO {settings['zero_stage']}{accumulated}"


def choose_checkpoint(folder: Path, resume: str, world: World) -> tuple[Path | None, list[str]]:
    """The intact checkpoint that `resume` asks for, and what is wrong with newer ones. Collective.

    Raises:
        InputError: the checkpoint asked for is absent or damaged, or all of a run's checkpoints are damaged; a run
            never starts afresh in silence where it has made steps before.
    """
    if resume == "never":
        return None, []
    if resume == "auto":
        checkpoint, faults = newest_intact(list_checkpoints(folder / CHECKPOINTS), world)
    else:
        checkpoint, faults = newest_intact([find_checkpoint(Path(resume))], world)
    if checkpoint is None and faults:
        raise InputError(
            f"no intact checkpoint to resume from ({' | '.join(faults)}); restore one, or start with --resume never"
        )
    return checkpoint, faults


def check_fit(checkpoint: Path, config: Config) -> None:
    """Raises InputError where a checkpoint is of another model."""
    saved = asdict(load_config([checkpoint / CONFIG_FILE]).model)
    for name, value in asdict(config.model).items():
        if saved.get(name) != value:
            raise InputError(
                f"{checkpoint} has model.{name} = {saved.get(name)}, the run is configured with {value}; "
                "use the checkpoint's setting, or start another run with --resume never"
            )
