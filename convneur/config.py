"""The configuration of a run: dataclass defaults, then YAML files, then `--section.key value`."""

from dataclasses import dataclass, field
from typing import Any

from convneur.data.config import DataConfig
from convneur.model import ModelConfig
from convneur.optim import OptimizerConfig, ScheduleConfig


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how often it speaks.

    Attributes:
        name: name of the run's folder.
        root: folder that holds the runs.
        seed: the one seed; initial weights, order, augmentation and drop path all derive from it.
        log_every_steps: optimizer steps between two lines of metrics.
        eval_every_epochs: epochs between two evaluations; the end of the run is always evaluated.
        checkpoint_every_steps: optimizer steps between two checkpoints; the end of the run is always kept.
        keep_checkpoints: newest checkpoints that are kept.
    """

    name: str = "convneur"
    root: str = "runs"
    seed: int = 0
    log_every_steps: int = 50
    eval_every_epochs: int = 1
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 3


@dataclass(frozen=True)
class TrainConfig:
    """The training step.

    Attributes:
        accumulation: micro-batches an optimizer step and rank.
        label_smoothing: probability mass spread over all classes.
        ema_decay: decay of the exponential moving average of the weights, per step; 0 for none.
    """

    accumulation: int = 1
    label_smoothing: float = 0.1
    ema_decay: float = 0.9999


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; saved as `config.yaml` in its folder.

    Attributes:
        deepspeed: goes to DeepSpeed as it is. Batch sizes, accumulation and clipping are filled in from the sections
            above and may not be contradicted.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
