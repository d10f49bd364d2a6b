"""The optimizer, its parameter groups and the learning rate as a function of the step alone."""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lamb, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from convneur.engine.config import OptimizerConfig, ScheduleConfig, checked_steps, peak_lr
from convneur.engine.methods import Implementation

Groups = list[dict[str, Any]]
Settings = dict[str, Any]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, implementation: Implementation, global_batch_size: int, offload: bool
) -> torch.optim.Optimizer:
    """The optimizer over two groups: matrices and filters decay; vectors, and what the model names, do not.

    A model that has a method `mup_groups` may name other groups, as ConvNeur does under muP; their learning rates hold
    once `build_schedule` has set them. None of the optimizers clips gradients, which is DeepSpeed's task. DeepSpeed's
    own are compiled when first used, for a minute.
    """
    groups = _call(model, "mup_groups", config.weight_decay, config.eps)
    if groups is None:
        exempt = _call(model, "no_weight_decay") or set()
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    state_device = "cpu" if offload else next(model.parameters()).device.type
    settings = {"lr": peak_lr(config, global_batch_size), "betas": config.betas, "eps": config.eps}
    return CONSTRUCTORS[config.name, implementation](groups, settings, state_device)


def _call(model: nn.Module, method: str, *words: Any) -> Any:
    """What a method returns that not every model has; None without it."""
    return getattr(model, method)(*words) if hasattr(model, method) else None


def _torch_adamw(groups: Groups, settings: Settings, device: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **settings)


def _timm_lamb(groups: Groups, settings: Settings, device: str) -> torch.optim.Optimizer:
    return Lamb(groups, max_grad_norm=None, **settings)


def _apex_adamw(groups: Groups, settings: Settings, device: str) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **settings)


def _apex_lamb(groups: Groups, settings: Settings, device: str) -> torch.optim.Optimizer:
    from apex.optimizers import FusedLAMB

    return FusedLAMB(groups, max_grad_norm=float("inf"), **settings)


def _deepspeed_adamw(groups: Groups, settings: Settings, device: str) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if device == "cpu":
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return FusedAdam(groups, adam_w_mode=True, **settings)


def _deepspeed_lamb(groups: Groups, settings: Settings, device: str) -> torch.optim.Optimizer:
    from deepspeed.ops.lamb import FusedLamb

    return FusedLamb(groups, **settings)


CONSTRUCTORS: dict[tuple[str, Implementation], Callable[[Groups, Settings, str], torch.optim.Optimizer]] = {
    ("adamw", "torch"): _torch_adamw,
    ("adamw", "deepspeed"): _deepspeed_adamw,
    ("adamw", "apex"): _apex_adamw,
    ("lamb", "torch"): _timm_lamb,
    ("lamb", "deepspeed"): _deepspeed_lamb,
    ("lamb", "apex"): _apex_lamb,
}
"""Of each method in each implementation; they take parameter groups, settings, and the type of the state's device."""


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """A schedule without state: `step_update(t)` sets the learning rate of optimizer step t = 0, 1, ...

    A group with an lr_scale gets that multiple of it. Raises InputError where nothing follows the warm-up.
    """
    warmup_steps, total_steps = checked_steps(config, steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - (warmup_steps if config.warmup_prefix else 0),
        lr_min=config.min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=config.warmup_lr,
        warmup_prefix=config.warmup_prefix,
        t_in_epochs=False,
    )
