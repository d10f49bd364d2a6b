"""The optimizer, its parameter groups and the learning rate as a function of the step alone."""

from typing import Any

import torch
from timm.optim import Lamb, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from convneur.engine.config import Implementation, OptimizerConfig, ScheduleConfig, checked_steps, peak_lr
from convneur.models.convneur import mup
from convneur.models.convneur.model import ConvNeur


def build_optimizer(
    model: ConvNeur, config: OptimizerConfig, implementation: Implementation, global_batch_size: int, offload: bool
) -> torch.optim.Optimizer:
    """The optimizer over two groups: matrices and filters decay; vectors, and what the model names, do not.

    With model.mup_base there are more (mup.py); their learning rates hold once `build_schedule` has set them.
    None of them clips gradients, which is DeepSpeed's task. DeepSpeed's own are compiled when first used, for a minute.
    """
    if model.config.mup_base:
        groups = mup.parameter_groups(model, model.config.width_factor, config.weight_decay, config.eps)
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=model.no_weight_decay())
    settings: dict[str, Any] = {
        "lr": peak_lr(config, global_batch_size),
        "betas": config.betas,
        "eps": config.eps,
    }
    if implementation == "torch":
        if config.name == "lamb":
            return Lamb(groups, max_grad_norm=None, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)
    if implementation == "apex":
        from apex.optimizers import FusedAdam, FusedLAMB

        if config.name == "lamb":
            return FusedLAMB(groups, max_grad_norm=float("inf"), **settings)
        return FusedAdam(groups, adam_w_mode=True, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.adam import FusedAdam as DeepSpeedFusedAdam
    from deepspeed.ops.lamb import FusedLamb

    if config.name == "lamb":
        return FusedLamb(groups, **settings)
    if offload or next(model.parameters()).device.type == "cpu":
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return DeepSpeedFusedAdam(groups, adam_w_mode=True, **settings)


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
