"""How a run starts: everything that the loop uses is built, and brought to the position to go on from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convneur.config import Config, save_config
from convneur.data.errors import InputError
from convneur.data.stores.choose import open_store
from convneur.data.stores.store import Store
from convneur.data.stream.choose import build_train_loader
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.shuffle import shuffle_warning
from convneur.data.stream.train import TrainLoader
from convneur.engine.config import choose_implementation
from convneur.engine.methods import Implementation
from convneur.engine.section import offloads_optimizer
from convneur.monitoring.bad_samples import BadSampleCount
from convneur.monitoring.gauges import Gauges, step_flops
from convneur.monitoring.guards import Guards
from convneur.monitoring.monitors import Monitors
from convneur.monitoring.profiler import Profiler
from convneur.monitoring.watchdog import Watchdog
from convneur.records.folder import CHECKPOINTS, CONFIG_FILE, REPRODUCE_FILE, STACKS, SUMMARY_FILE, TRACE_FILE
from convneur.records.log import TrainingLog
from convneur.records.provenance import differences, read_record, record, write_record
from convneur.run.keeper import Keeper
from convneur.run.resume import Position, find_position
from convneur.run.run import Run
from convneur.run.scorer import Scorer
from convneur.run.trainer import Trainer, build_trainer
from convneur.system.agreement import led
from convneur.system.determinism import set_determinism
from convneur.system.stopping import StopRequest
from convneur.system.world import World
from convneur.tasks.choose import build_task


@contextmanager
def started_run(config: Config, world: World, folder: Path, resume: str, profile: bool = False) -> Iterator[Run]:
    """A run at the position to start from; closes its files and lets go of signals, however the block ends.

    Collective; see `convneur.train.train` for what it takes and raises.
    """
    with StopRequest() as stop_request, Watchdog(config.watchdog, folder / STACKS, world.rank) as watchdog:
        run = _start(config, world, folder, resume, stop_request, watchdog, profile)
        try:
            yield run
        finally:
            run.monitors.close()
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
    """Builds everything a rank trains with, and loads the checkpoint to resume from; writes only when all fits."""
    started = time.monotonic()
    set_determinism(config.run.determinism)
    data = _open_data(config, world)
    task = build_task(config, world.device)
    implementation = choose_implementation(config.optimizer, world.device.type, offloads_optimizer(config.deepspeed))
    trainer = build_trainer(task, config, world, implementation, data.loader.steps_per_epoch)
    position = find_position(config, world, folder, resume, data.loader, data.store.classes, task.metrics[0])
    if position.checkpoint:
        trainer.load(position.checkpoint)
    log, changed = _open_records(config, world, folder, position, data.loader.steps_per_epoch)
    flops = step_flops(config.model, config.data.image_size)
    for line in _resumed(config, position, trainer, data, changed):
        log.say(line)
    for line in _trained(config, world, trainer, data, implementation, flops):
        log.say(line)
    keeper = Keeper(
        folder=folder / CHECKPOINTS,
        config=config,
        world=world,
        trainer=trainer,
        loader=data.loader,
        classes=data.store.classes,
        metric=task.metrics[0],
        log=log,
        watchdog=watchdog,
        position=position,
        started=started,
    )
    return Run(
        config=config,
        world=world,
        folder=folder,
        task=task,
        loader=data.loader,
        trainer=trainer,
        monitors=_build_monitors(config, world, folder, trainer, data, flops, log, watchdog, profile),
        scorer=Scorer(task, world, data.eval_loader, data.eval_images, trainer, log, watchdog, stop_request),
        keeper=keeper,
        log=log,
        stop_request=stop_request,
        done=position.step,
    )


@dataclass(frozen=True)
class _Data:
    """Training samples, and what this rank reads of them and of the held-out ones."""

    store: Store
    loader: TrainLoader
    eval_loader: EvalLoader
    eval_images: int


def _open_data(config: Config, world: World) -> _Data:
    store = open_store(config.data, config.data.train_split)
    eval_store = open_store(config.data, config.data.val_split)
    loader = build_train_loader(
        config.data,
        store,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        accumulation=config.train.accumulation,
    )
    eval_loader = EvalLoader(config.data, eval_store, rank=world.rank, world_size=world.size)
    return _Data(store, loader, eval_loader, len(eval_store))


def _open_records(
    config: Config, world: World, folder: Path, position: Position, steps_per_epoch: int
) -> tuple[TrainingLog, list[str]]:
    """Writes what the run is made of, and opens its log; also says in what it has changed since it was started."""
    total_steps = config.schedule.epochs * steps_per_epoch
    changed: list[str] = []
    with led(world):
        if world.is_main and position.step < total_steps:
            (folder / SUMMARY_FILE).unlink(missing_ok=True)  # of a shorter run, before its configuration goes
        if world.is_main:
            changed += _write_records(config, world, folder, resumed=position.state is not None)
        log = TrainingLog(
            folder,
            world,
            start_step=position.step,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            images_per_step=config.data.global_batch_size,
            every_steps=config.run.log_every_steps,
            wandb_project=config.run.wandb_project,
        )
    return log, changed


def _resumed(config: Config, position: Position, trainer: Trainer, data: _Data, changed: list[str]) -> Iterator[str]:
    """What is to be said of where the run goes on."""
    yield from (f"warning: damaged checkpoint left out: {fault}" for fault in position.faults)
    yield from (f"warning: changed since the run was started: {line}" for line in changed)
    if position.lost:
        yield f"warning: no checkpoint yet: the {position.lost} steps that this run has made before are made anew"
    if position.state is None:
        return
    total_steps = config.schedule.epochs * data.loader.steps_per_epoch
    yield f"resuming from {position.checkpoint}, {position.step} of {total_steps} steps made"
    before, now = position.state.engine, trainer.engine.settings
    if before != now:
        yield (
            f"resuming {_in_words(before)} as {_in_words(now)}: weights, moments and averages are equal "
            "to the bit, the steps to come are not: sums run in another order"
        )


def _trained(
    config: Config, world: World, trainer: Trainer, data: _Data, implementation: Implementation, flops: float
) -> Iterator[str]:
    """What is to be said of the model, the data and what computes it."""
    if warning := config.model.depth_warning:
        yield f"warning: {config.model.variant} has {warning}"
    if world.is_main and (warning := shuffle_warning(config.data, data.store, config.run.seed)):
        yield f"warning: {warning}"
    yield (
        f"{config.model.variant}: {trainer.engine.parameters / 1e6:.2f} M parameters, "
        f"{world.size} x {world.device.type}, ZeRO {trainer.engine.stage}, "
        f"{config.optimizer.name} of {implementation}, {len(data.store):,} training images, "
        f"{data.loader.steps_per_epoch} steps an epoch, {flops / 1e9:.3g} GFLOPs to train on an image"
    )


def _build_monitors(
    config: Config,
    world: World,
    folder: Path,
    trainer: Trainer,
    data: _Data,
    flops: float,
    log: TrainingLog,
    watchdog: Watchdog,
    profile: bool,
) -> Monitors:
    engine, bad_samples = trainer.engine, data.loader.bad_samples
    return Monitors(
        watchdog=watchdog,
        guards=Guards(config.guards, world, engine, trainer.ema, data.store.where, config.data.image_size, log.say),
        gauges=Gauges(world, flops, engine.gradient_norm, bad_samples),
        bad_samples=BadSampleCount(config.data, len(data.store), bad_samples, world.device),
        profiler=Profiler(folder / TRACE_FILE, world, log.say) if profile else None,
    )


def _write_records(config: Config, world: World, folder: Path, resumed: bool) -> list[str]:
    """Leaves in the run's folder what it is made of; says in what a resumed one has changed since it was started."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG_FILE)
    made_with = record(config, world.size)
    if not resumed:
        write_record(folder, made_with)
        return []
    try:
        return differences(read_record(folder), made_with) if (folder / REPRODUCE_FILE).exists() else []
    except InputError as error:  # no reason not to go on
        return [str(error)]


def _in_words(settings: dict[str, Any]) -> str:
    accumulated = f", {settings['accumulation']} micro-batches" if settings["accumulation"] > 1 else ""
    return f"{settings['world_size']} x ZeRO {settings['zero_stage']}{accumulated}"
