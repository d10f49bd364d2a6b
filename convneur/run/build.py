"""How a run starts: everything that the loop uses is built, and brought to the position to go on from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convneur.config import Config, save_config
from convneur.data.errors import InputError
from convneur.data.format.classes import check_same_classes
from convneur.data.stores.choose import open_store
from convneur.data.stream.choose import build_train_loader
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.shuffle import shuffle_warning
from convneur.engine.config import choose_implementation
from convneur.engine.section import offloads_optimizer
from convneur.monitoring.bad_samples import BadSampleCount
from convneur.monitoring.gauges import Gauges, step_flops
from convneur.monitoring.guards import Guards
from convneur.monitoring.monitors import Monitors
from convneur.monitoring.profiler import Profiler
from convneur.monitoring.watchdog import Watchdog
from convneur.records.checkpoint import read_classes, read_state
from convneur.records.folder import CHECKPOINTS, CONFIG_FILE, REPRODUCE_FILE, STACKS, SUMMARY_FILE, TRACE_FILE
from convneur.records.metrics import TrainingLog
from convneur.records.provenance import differences, read_record, record, write_record
from convneur.records.saved import salvage_metrics
from convneur.run.keeper import Keeper
from convneur.run.resume import best_so_far, check_fit, check_length, choose_checkpoint
from convneur.run.run import Run
from convneur.run.scorer import Scorer
from convneur.run.trainer import build_trainer
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
    task = build_task(config, world.device)
    implementation = choose_implementation(config.optimizer, world.device.type, offloads_optimizer(config.deepspeed))
    trainer = build_trainer(task, config, world, implementation, loader.steps_per_epoch)
    engine = trainer.engine

    checkpoint, faults = choose_checkpoint(folder, resume, world)
    state = None
    if checkpoint:
        state = read_state(checkpoint)
        check_fit(checkpoint, config)
        if trained := read_classes(checkpoint):
            check_same_classes(trained, store.classes, checkpoint, config.data.root)
        loader.check_state(state.data)
        trainer.load(checkpoint)
    made = [record["step"] for record in salvage_metrics(folder)[0]] if resume == "auto" and not state else []
    lost = max(made, default=0)
    start_step, total_steps = state.step if state else 0, config.schedule.epochs * loader.steps_per_epoch
    if checkpoint:
        check_length(checkpoint, start_step, config.schedule.epochs, loader.steps_per_epoch)
    best = None
    if config.run.keep_best and checkpoint and state:
        best, missed = best_so_far(folder, checkpoint, state, task.metrics[0], world)
        faults += missed

    changed: list[str] = []
    with led(world):
        if world.is_main and start_step < total_steps:
            (folder / SUMMARY_FILE).unlink(missing_ok=True)  # of a shorter run, before its configuration goes
        if world.is_main:
            changed += _write_records(config, world, folder, resumed=state is not None)
        log = TrainingLog(
            folder,
            world,
            start_step=start_step,
            total_steps=total_steps,
            steps_per_epoch=loader.steps_per_epoch,
            images_per_step=config.data.global_batch_size,
            every_steps=config.run.log_every_steps,
            wandb_project=config.run.wandb_project,
        )
    for fault in faults:
        log.say(f"warning: damaged checkpoint left out: {fault}")
    for line in changed:
        log.say(f"warning: changed since the run was started: {line}")
    if lost:
        log.say(f"warning: no checkpoint yet: the {lost} steps that this run has made before are made anew")
    if state:
        log.say(f"resuming from {checkpoint}, {start_step} of {total_steps} steps made")
        if state.engine != (settings := engine.settings):
            log.say(
                f"resuming {_in_words(state.engine)} as {_in_words(settings)}: weights, moments and averages are equal "
                "to the bit, the steps to come are not: sums run in another order"
            )
    if warning := config.model.depth_warning:
        log.say(f"warning: {config.model.variant} has {warning}")
    if world.is_main and (warning := shuffle_warning(config.data, store, config.run.seed)):
        log.say(f"warning: {warning}")
    flops = step_flops(config.model, config.data.image_size)
    log.say(
        f"{config.model.variant}: {engine.parameters / 1e6:.2f} M parameters, "
        f"{world.size} x {world.device.type}, ZeRO {engine.stage}, "
        f"{config.optimizer.name} of {implementation}, {len(store):,} training images, "
        f"{loader.steps_per_epoch} steps an epoch, {flops / 1e9:.3g} GFLOPs to train on an image"
    )
    guards = Guards(config.guards, world, engine, trainer.ema, store.where, config.data.image_size, log.say)
    return Run(
        config=config,
        world=world,
        folder=folder,
        task=task,
        loader=loader,
        trainer=trainer,
        monitors=Monitors(
            watchdog=watchdog,
            guards=guards,
            gauges=Gauges(world, flops, engine.gradient_norm, loader.bad_samples),
            bad_samples=BadSampleCount(config.data, len(store), loader.bad_samples, world.device),
            profiler=Profiler(folder / TRACE_FILE, world, log.say) if profile else None,
        ),
        scorer=Scorer(task, world, eval_loader, len(eval_store), trainer, log, watchdog, stop_request),
        keeper=Keeper(
            folder=folder / CHECKPOINTS,
            config=config,
            world=world,
            trainer=trainer,
            loader=loader,
            classes=store.classes,
            metric=task.metrics[0],
            log=log,
            watchdog=watchdog,
            saved=start_step if checkpoint is None or checkpoint.parent == folder / CHECKPOINTS else -1,
            best=best,
            went_back=state.went_back if state else False,
            seconds_before=state.seconds if state else 0.0,
            started=started,
        ),
        log=log,
        stop_request=stop_request,
        done=start_step,
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
