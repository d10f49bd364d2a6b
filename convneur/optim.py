"""AdamW's parameter groups and the learning rate as a function of the step alone."""

from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101).

    Attributes:
        lr: peak learning rate.
        weight_decay: decoupled decay; biases, norms and other vectors are exempt.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        clip_grad: largest global gradient norm; 0 for no clipping.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine, set anew at every optimizer step.

    Attributes:
        epochs: length of the run.
        warmup_epochs: length of the warm-up; it is part of epochs.
        warmup_lr: learning rate that the warm-up starts from.
        min_lr: learning rate at the end of the cosine.
    """

    epochs: int = 300
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices and filters decay, vectors (norms, biases, layer scales) do not."""
    groups = param_groups_weight_decay(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def build_schedule(optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """A schedule without state: `step_update(t)` sets the learning rate of optimizer step t = 0, 1, ..."""
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * steps_per_epoch - warmup_steps,
        lr_min=config.min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=config.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
