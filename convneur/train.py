"""Training: the step and the loop around it. `convneur.run.build` builds what they use, `convneur.run.run` holds it."""

from pathlib import Path

import torch
from torch import Tensor

from convneur.config import Config
from convneur.data.errors import WorkerError
from convneur.data.keys import key, seed_libraries
from convneur.data.stream.batch import Batch
from convneur.engine.ema import Ema
from convneur.engine.engine import Engine
from convneur.records.summary import Summary
from convneur.run.build import started_run
from convneur.system.stopping import StopNow
from convneur.system.world import World
from convneur.tasks.task import Task


def train_step(engine: Engine, batches: list[Batch], task: Task, ema: Ema | None) -> Tensor:
    """One optimizer step over this rank's micro-batches; returns their mean loss, still on the device.

    The task says what the loss of a micro-batch is. It is averaged over the global batch: DeepSpeed divides by the
    micro-batches and ranks, sums the gradients, clips them and, after the last micro-batch, steps the optimizer, unless
    the gradients aren't finite.
    """
    total = torch.zeros((), device=engine.device)
    for batch in batches:
        images, targets = task.prepare(batch)
        loss = task.losses(engine, images, targets)["loss"]
        engine.backward(loss)
        engine.step()
        total += loss.detach()
    if ema:
        ema.update()
    return total / len(batches)


def train(config: Config, world: World, run_dir: Path, resume: str = "never", profile: bool = False) -> Summary | None:
    """Trains a run to its end, or until a signal asks it to stop. Collective: every rank passes the same arguments.

    Args:
        config: what to train.
        world: this process among the ranks.
        run_dir: the run's folder, made if it isn't there.
        resume: "never" starts from initial weights, "auto" from the newest intact checkpoint in `run_dir` where
            there is one; anything else is the checkpoint, or the run, to start from.
        profile: whether to trace a few steps; `convneur.monitoring.profiler` says what becomes of it.

    Returns:
        The summary of the finished run; None where a signal stopped it, after saving a checkpoint.

    Raises:
        InputError: configuration, data and checkpoint don't fit each other; nothing has been written then.
        TrainingError: gradients stay bad, ranks disagree, or the last checkpoint can't be written; those that exist
            are good.
        WorkerError: a process that decodes images was killed.
    """
    with started_run(config, world, run_dir, resume, profile) as run:
        try:
            trainer, monitors = run.trainer, run.monitors
            run.evaluate_if_missed()
            for step, batches in run.steps():
                # Drop path draws from (seed, step, rank) alone, so a resumed run needs no saved generators.
                seed_libraries(key(config.run.seed, "step", step, world.rank), world.device)
                trainer.schedule.step_update(step)
                loss = train_step(trainer.engine, batches, run.task, trainer.ema)
                run.done = step + 1
                monitors.guards.observe(step, batches, loss)
                run.log.step(step + 1, loss, trainer.learning_rate, monitors.gauges)
                run.guard_if_due(step + 1)
                run.evaluate_if_due(step + 1)
                run.stop_request.check()
                run.keeper.save_if_due(step + 1)
            return run.finish()
        except StopNow as stop:
            run.stop(stop.signal)
            return None
        except WorkerError:
            if world.size == 1:  # of several, others are in the middle of the step
                run.save_unsaved()
            raise
