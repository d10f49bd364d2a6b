"""What types can't say about a configuration: ranges, and how its sections fit together.

Sections check themselves where they can (`ModelConfig`), and `convneur.data.check` holds the data section against the
data; this is the rest.
"""

import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from math import inf
from operator import attrgetter

import torch

from convneur.config import Config, deepspeed_config
from convneur.data.check import check_values as check_data_values
from convneur.data.errors import InputError
from convneur.engine.config import check_no_lock, choose_implementation, peak_lr
from convneur.engine.methods import METHODS
from convneur.engine.section import offloads_optimizer
from convneur.models.build import family_of
from convneur.system.apex import examine_apex
from convneur.tasks.metrics import metrics_of

Range = tuple[str, Callable[[float], bool]]
COUNT: Range = ("at least 1", lambda x: x >= 1)
POSITIVE: Range = ("a finite number above 0", lambda x: 0 < x < inf)
NOT_NEGATIVE: Range = ("a finite number of at least 0", lambda x: 0 <= x < inf)
FRACTION: Range = ("a number in [0, 1)", lambda x: 0 <= x < 1)

RANGES = {
    "run.seed": NOT_NEGATIVE,
    "run.log_every_steps": COUNT,
    "run.eval_every_epochs": COUNT,
    "run.checkpoint_every_steps": COUNT,
    "run.keep_checkpoints": COUNT,
    "run.keep_every_steps": NOT_NEGATIVE,
    "run.keep_every_epochs": NOT_NEGATIVE,
    "model.num_classes": COUNT,
    "train.accumulation": COUNT,
    "train.label_smoothing": FRACTION,
    "train.ema_decay": FRACTION,
    "optimizer.lr": POSITIVE,
    "optimizer.lr_batch_size": NOT_NEGATIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.eps": POSITIVE,
    "optimizer.clip_grad": NOT_NEGATIVE,
    "guards.max_bad_steps": COUNT,
    "guards.spike": POSITIVE,
    "guards.compare_every_steps": COUNT,
    "watchdog.seconds": NOT_NEGATIVE,
    "watchdog.long_seconds": POSITIVE,
    "schedule.epochs": COUNT,
    "schedule.warmup_epochs": NOT_NEGATIVE,
    "schedule.warmup_lr": NOT_NEGATIVE,
    "schedule.min_lr": NOT_NEGATIVE,
}


def check_config(config: Config, world_size: int) -> None:
    """Holds a configuration against a run on `world_size` ranks; InputError for the first thing that can't work.

    Looks at no file and allocates nothing.
    """
    check_values(config)
    deepspeed_config(config, world_size)
    _check_implementations(config)
    if config.run.wandb_project and find_spec("wandb") is None:
        raise InputError(
            f"run.wandb_project is {config.run.wandb_project!r}, but wandb isn't installed: pip install wandb, or leave"
            " it out: metrics.jsonl and TensorBoard have the same values"
        )


def check_values(config: Config) -> None:
    """The part of it that holds on any machine: InputError for the first value that is out of its range."""
    check_data_values(config.data)
    metrics_of(config)
    for key, (expected, holds) in RANGES.items():
        value = attrgetter(key)(config)
        if not holds(value):
            raise InputError(f"{key} is {value}, expected {expected}")
    for beta in config.optimizer.betas:
        if not FRACTION[1](beta):
            raise InputError(f"optimizer.betas is {list(config.optimizer.betas)}, expected each {FRACTION[0]}")
    if config.schedule.warmup_epochs >= config.schedule.epochs:
        raise InputError(
            f"schedule.warmup_epochs is {config.schedule.warmup_epochs}, expected less than schedule.epochs,"
            f" {config.schedule.epochs}: the cosine follows the warm-up"
        )
    peak = peak_lr(config.optimizer, config.data.global_batch_size)
    for key in ("warmup_lr", "min_lr"):
        if (value := getattr(config.schedule, key)) > peak:
            scaled = f" for {config.data.global_batch_size} images" if peak != config.optimizer.lr else ""
            raise InputError(f"schedule.{key} is {value}, expected at most optimizer.lr{scaled}, {peak}")
    if config.data.image_size < (smallest := family_of(config.model).smallest_image):
        raise InputError(f"data.image_size is {config.data.image_size}, expected at least {smallest}")
    check_places(config)


def check_places(config: Config) -> None:
    """Raises InputError where a run's name is not that of one folder, or its path can't stand in a line of a script."""
    name = config.run.name
    if name in {"", ".", ".."} or "/" in name:
        raise InputError(f"run.name is {name!r}, expected the name of one folder; run.root says where it lies")
    for key, value in {"run.name": name, "run.root": config.run.root}.items():
        if any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in value):
            raise InputError(f"{key} is {value!r}, expected no line ends or other control characters in it")


def _check_implementations(config: Config) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    offload = offloads_optimizer(config.deepspeed)
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    name, method = config.optimizer.name, METHODS[config.optimizer.name]
    if method.whole_tensors and stage:
        raise InputError(
            f"optimizer.name is {name!r} at ZeRO stage {stage}, which cuts parameters into pieces, while {method.title}"
            " needs the norms of whole ones: use deepspeed.zero_optimization.stage 0, or optimizer.name adamw"
        )
    if method.whole_tensors and config.model.mup_base:
        raise InputError(
            f"optimizer.name is {name!r} with model.mup_base {config.model.mup_base!r}, but muP is derived for AdamW,"
            f" and {method.title} scales every step by the norm of its weights: use optimizer.name adamw, or leave"
            " model.mup_base out"
        )
    if choose_implementation(config.optimizer, device, offload) == "deepspeed":
        check_no_lock(config.optimizer, device, offload)
    if config.train.norm_implementation == "apex":
        apex = examine_apex()
        reason = "there is no CUDA device" if device == "cpu" else f"apex is {apex.status}: {apex.note}"
        if device == "cpu" or apex.status != "ok":
            raise InputError(f"train.norm_implementation is 'apex', but {reason}; torch works everywhere")
