"""The configuration of a run: dataclass defaults, then YAML files, then `--section.key value`.

Sections are dataclasses beside the code they configure; `convneur.settings` reads them. Only `deepspeed` is a free
mapping. What is saved with a run is resolved and includes nothing.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from convneur.data.config import DataConfig
from convneur.data.errors import DamagedError, InputError
from convneur.data.files import atomic_write, check_kind
from convneur.engine.config import OptimizerConfig, ScheduleConfig
from convneur.engine.section import Settled, complete
from convneur.models.convneur.config import ModelConfig
from convneur.monitoring.config import GuardConfig, WatchdogConfig
from convneur.settings import load_as, read_file, resolve, yaml_text
from convneur.system.determinism import Determinism

_DEEPSPEED = {
    "example": "zero_optimization.stage",
    # People know it from apex, which has it no more.
    "instead_of": {"amp": "deepspeed.torch_autocast sets mixed precision"},
}


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how often it speaks.

    Attributes:
        name: name of the run's folder.
        root: folder that holds the runs.
        seed: the one seed; initial weights, order, augmentation and drop path all derive from it.
        determinism: strict takes the algorithms that give the same bits each time, on the same hardware, versions and
            number of ranks; fast takes what PyTorch usually takes.
        log_every_steps: optimizer steps between two lines of metrics.
        wandb_project: project at Weights & Biases that metrics go to as well, which needs wandb; empty for none.
        eval_every_epochs: epochs between two evaluations; the end of the run is always evaluated.
        checkpoint_every_steps: optimizer steps between two checkpoints; the end of the run is always kept.
        keep_checkpoints: newest checkpoints that are kept.
        keep_every_steps: checkpoints of multiples of this many steps are made and kept for good; 0 for none.
        keep_every_epochs: the same for multiples of this many epochs.
        keep_best: whether a checkpoint of the evaluation with the best score so far, of raw or averaged weights by
            the task's first metric, is made and kept.
    """

    name: str = "convneur"
    root: str = "runs"
    seed: int = 0
    determinism: Determinism = "fast"
    log_every_steps: int = 50
    wandb_project: str = ""
    eval_every_epochs: int = 1
    checkpoint_every_steps: int = 500
    keep_checkpoints: int = 3
    keep_every_steps: int = 0
    keep_every_epochs: int = 0
    keep_best: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """The training step.

    Attributes:
        accumulation: micro-batches an optimizer step and rank.
        label_smoothing: probability mass spread over all classes.
        ema_decay: decay of the exponential moving average of the weights, per step; 0 for none.
        compile: whether torch.compile translates the model, which takes minutes at the start of a run.
        recompute: whether blocks recompute their activations in the backward pass instead of keeping them: less memory,
            about a third more time, the same bits.
        norm_implementation: whose code runs layer norms: torch, or apex (NVIDIA's FusedLayerNorm, on CUDA devices).
    """

    accumulation: int = 1
    label_smoothing: float = 0.1
    ema_decay: float = 0.9999
    compile: bool = False
    recompute: bool = False
    norm_implementation: Literal["torch", "apex"] = "torch"


@dataclass(frozen=True)
class TaskConfig:
    """What the model is trained for.

    Attributes:
        name: classification: which class an image is of.
    """

    name: str = "classification"


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; saved as `config.yaml` in its folder.

    Attributes:
        deepspeed: goes to DeepSpeed as it is; deepspeed.ai/docs/config-json lists its keys, and the flag of one is
            such as --deepspeed.zero_optimization.stage. Batch sizes, accumulation and clipping are filled in from the
            other sections and may not be contradicted.
    """

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict, metadata=_DEEPSPEED)


SAVED_SECTIONS = ("run", "model", "data", "train", "optimizer", "schedule", "deepspeed")
"""What every saved configuration has, however old: the others came later. `deepspeed` is the last in the file."""


def load_config(config_files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Resolves a configuration: the dataclasses' defaults, then the files, then the overrides; the last one wins.

    config_files: YAML files, each with any part of the sections.
    overrides: words of a command line, `--section.key value` or `--section.key=value`.

    Raises InputError where a file can't be read, a key is unknown or a value doesn't fit its type.
    """
    return load_as(Config, config_files, overrides)


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given on `world_size` ranks: the section, with what the others settle.

    Raises InputError where the section contradicts the others, or can't work (`convneur.engine.section`).
    """
    batch, accumulation, clip = config.data.global_batch_size, config.train.accumulation, config.optimizer.clip_grad
    return complete(config.deepspeed, Settled(batch, accumulation, clip, world_size))


def saved_config(path: Path) -> Config:
    """The configuration that `save_config` has written to a file, which names every section.

    Raises DamagedError where it doesn't, as after a full disk: the defaults would pass for what the run was made with.
    """
    try:
        with suppress(OSError):  # which reading reports
            check_kind(path)
        sources = list(read_file(path))
        absent = [name for name in SAVED_SECTIONS if name not in sources[-1][1]]
        if absent:
            raise InputError(f"{path}: has no {', '.join(absent)}, expected every section of a run; restore it")
        return resolve(Config, sources)
    except InputError as error:
        raise DamagedError(str(error)) from error


def save_config(config: Config, path: Path) -> None:
    """Writes every key of a configuration to a YAML file that `saved_config` reads back to an equal one."""
    with atomic_write(path) as file:
        file.write(config_text(config).encode())


def config_text(config: Config) -> str:
    """Every key of a configuration, as YAML."""
    return yaml_text(config)
