"""The settings of the optimizer and the learning rate, and whose code runs them. Loads no PyTorch."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convneur.data.errors import InputError
from convneur.engine.methods import METHODS, Implementation, Method
from convneur.system.apex import examine_apex


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) or LAMB (arXiv 1904.00962).

    Attributes:
        name: the method. LAMB's steps are scaled by the norms of whole parameters, so it needs ZeRO stage 0.
        implementation: whose code runs it: torch (AdamW fused; LAMB is timm's), deepspeed (FusedAdam and FusedLamb on
            CUDA devices, CPUAdam on the CPU and for offloaded state), apex (NVIDIA's FusedAdam and FusedLAMB); auto
            takes the fastest that is installed and fits the device, and the run's log says which.
        lr: peak learning rate, for a global batch of lr_batch_size images.
        lr_batch_size: global batch that lr was chosen for; 0 where it holds for any.
        lr_scaling: how the learning rate follows the global batch away from lr_batch_size: in proportion to it, or to
            its square root.
        weight_decay: decoupled decay; vectors (biases, norms, scales) are exempt, as is what
            ConvNeur.no_weight_decay names.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        clip_grad: largest global gradient norm; 0 for no clipping.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    implementation: Literal["auto", "torch", "deepspeed", "apex"] = "auto"
    lr: float = 1e-3
    lr_batch_size: int = 0
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine, set anew at every optimizer step. These rates don't follow the batch size.

    Attributes:
        epochs: length of the run.
        warmup_epochs: length of the warm-up; it is part of epochs.
        warmup_prefix: whether the cosine starts at its peak after the warm-up; otherwise it runs from the first step,
            and the warm-up covers its beginning.
        warmup_lr: learning rate that the warm-up starts from.
        min_lr: learning rate at the end of the cosine.
    """

    epochs: int = 300
    warmup_epochs: float = 5.0
    warmup_prefix: bool = True
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5


def peak_lr(config: OptimizerConfig, global_batch_size: int) -> float:
    """The learning rate at the peak of the schedule, for optimizer steps of `global_batch_size` images."""
    if not config.lr_batch_size:
        return config.lr
    ratio = global_batch_size / config.lr_batch_size
    return config.lr * (ratio if config.lr_scaling == "linear" else ratio**0.5)


def choose_implementation(config: OptimizerConfig, device: str, offload: bool) -> Implementation:
    """Whose code runs the optimizer where the model is on `device`, "cpu" or "cuda", and its state is offloaded or not.

    Raises InputError where the one asked for is missing or doesn't fit; says how to install it.
    """
    method, state_device = METHODS[config.name], "cpu" if offload else device
    if config.implementation != "auto":
        if reason := _lacks(config.implementation, method, state_device):
            raise InputError(f"optimizer.implementation is {config.implementation!r}, but {reason}")
        return config.implementation
    wanted = method.offloaded if offload else method.faster
    return next((one for one in wanted if not _lacks(one, method, state_device)), "torch")


def _lacks(implementation: Implementation, method: Method, device: str) -> str:
    """Why an implementation can't run a method on a device, and what to do; empty if it can."""
    if implementation == "apex":
        if device != "cuda":
            return "apex runs on CUDA devices only: use auto"
        apex = examine_apex()
        return "" if apex.status == "ok" else f"apex is {apex.status}: {apex.note}"
    if implementation == "deepspeed":
        if device not in method.extensions:
            return f"DeepSpeed's {method.title} runs on CUDA devices only: use auto"
        compiler, package = ("nvcc", "the CUDA toolkit") if device == "cuda" else ("g++", "g++ (apt-get install g++)")
        if not shutil.which(compiler):
            return f"DeepSpeed compiles it with {compiler}, which isn't there: install {package}, or use auto"
    return ""


def check_no_lock(config: OptimizerConfig, device: str, offload: bool) -> None:
    """Raises InputError where a build of the extension that DeepSpeed compiles for this optimizer is locked.

    DeepSpeed would wait for the lock to go, for ever if the build was killed. Call it before any rank starts to build.
    """
    from torch.utils.cpp_extension import _get_build_directory

    extension = METHODS[config.name].extensions["cpu" if offload else device]
    lock = Path(_get_build_directory(extension, verbose=False)) / "lock"
    if lock.exists():
        raise InputError(
            f"{lock} is there: another process is compiling DeepSpeed's {extension}, or was killed while it did;"
            " wait until it is done, or delete the file"
        )


def checked_steps(config: ScheduleConfig, steps_per_epoch: int) -> tuple[int, int]:
    """Steps of the warm-up and of the whole run; InputError where nothing follows the warm-up."""
    warmup_steps, total_steps = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    if warmup_steps >= total_steps:
        raise InputError(
            f"schedule.warmup_epochs is {config.warmup_epochs}, which at {steps_per_epoch} steps an epoch rounds to all"
            f" {total_steps} steps of the run, expected to leave one to the cosine: take fewer, or a smaller"
            " data.global_batch_size"
        )
    return warmup_steps, total_steps
