"""What a step changes: the engine with the weights, the schedule of the learning rate, and the averaged weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.scheduler.scheduler import Scheduler

from convneur.config import Config, deepspeed_config
from convneur.engine.build import build_engine, use_apex_norms
from convneur.engine.ema import Ema
from convneur.engine.engine import Engine
from convneur.engine.methods import Implementation
from convneur.engine.optimizer import build_optimizer, build_schedule
from convneur.engine.section import offloads_optimizer
from convneur.models.backbone import Model
from convneur.models.build import check_initial
from convneur.records.checkpoint import load_checkpoint
from convneur.system.world import World
from convneur.tasks.task import Task


@dataclass(frozen=True)
class Trainer:
    """What a step changes.

    Attributes:
        engine: the weights, and the optimizer's moments.
        schedule: sets the learning rate.
        ema: the averaged weights; None where no average is kept.
    """

    engine: Engine
    schedule: Scheduler
    ema: Ema | None

    @property
    def learning_rate(self) -> float:
        """Learning rate that the optimizer is set to; under muP the one before a group's own scale."""
        return self.engine.learning_rate

    def load(self, checkpoint: Path) -> None:
        """Takes weights, moments and average from an intact checkpoint. Collective."""
        load_checkpoint(checkpoint, self.engine, self.ema)


def initial_model(task: Task, seed: int) -> Model:
    """The model with its initial weights, the same ones on every rank."""
    torch.manual_seed(seed)
    return task.build_model()


def build_trainer(
    task: Task, config: Config, world: World, implementation: Implementation, steps_per_epoch: int
) -> Trainer:
    """The model with its initial weights, in an engine, with its schedule and average. Collective."""
    model = initial_model(task, config.run.seed).to(world.device)
    model.set_grad_checkpointing(config.train.recompute)
    if config.train.norm_implementation == "apex":
        use_apex_norms(model)
    check_initial(model, config.model, config.data.image_size)
    offload = offloads_optimizer(config.deepspeed)
    optimizer = build_optimizer(model, config.optimizer, implementation, config.data.global_batch_size, offload)
    schedule = build_schedule(optimizer, config.schedule, steps_per_epoch)
    engine = build_engine(model, optimizer, deepspeed_config(config, world.size), compile=config.train.compile)
    return Trainer(engine, schedule, Ema(engine, config.train.ema_decay) if config.train.ema_decay else None)
