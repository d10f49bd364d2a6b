"""DeepSpeed around the model."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import get_torch_autocast_dtype, get_torch_autocast_enabled
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME, has_comm_dtype
from torch import Tensor, nn

from convneur.engine.loss_scale import mend_loss_scale

Weights = dict[str, Tensor]


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], *, compile: bool = False
) -> DeepSpeedEngine:
    """Hands the model and its optimizer to DeepSpeed; the process group exists already.

    The model keeps its contiguous (NCHW) weights: ZeRO 1 and above can't flatten channels_last ones. With `compile` it
    is translated by torch.compile at its first step.
    """
    # On CPUs DeepSpeed compiles a shared-memory all-reduce at start-up. That takes a minute, and a build that was
    # killed leaves a lock on which every later run hangs; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if zero_stage(engine):
        mend_loss_scale(engine)
    if zero_stage(engine) == 3:
        _gather_vectors_in_float32(model)
    if engine.bfloat16_enabled() or engine.fp16_enabled():
        # DeepSpeed's own half precision modes convert the parameters, and leave it to the caller to convert the input.
        dtype = next(model.parameters()).dtype
        model.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
    if compile:
        engine.compile()
    return engine


def use_apex_norms(model: nn.Module) -> None:
    """Puts NVIDIA apex's FusedLayerNorm, with the parameters that are there, in the place of every nn.LayerNorm."""
    from apex.normalization import FusedLayerNorm

    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is nn.LayerNorm:
                fused = FusedLayerNorm(norm.normalized_shape, eps=norm.eps)
                fused.weight, fused.bias = norm.weight, norm.bias
                setattr(parent, name, fused)


def _gather_vectors_in_float32(model: nn.Module) -> None:
    """Keeps ZeRO 3 from gathering biases in bfloat16 under autocast.

    It gathers them in float32 after a step, but in bfloat16 where it fetches them anew, as it does once in the first
    step after a start, and its linear layers add them as they are. So the first step of a resumed run would differ in
    its last bits. Matrices don't matter: autocast rounds them anyway.
    """
    for parameter in model.parameters():
        if len(true_shape(parameter)) == 1 and has_comm_dtype(parameter):
            delattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME)


def zero_stage(engine: DeepSpeedEngine) -> int:
    """The ZeRO stage, 0 to 3: which of optimizer state (1), gradients (2) and parameters (3) are partitioned."""
    return int(engine.zero_optimization_stage())


def engine_settings(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The settings that the order of summation depends on, and so the last bits of a step."""
    return {
        "zero_stage": zero_stage(engine),
        "world_size": dist.get_world_size(),
        "accumulation": engine.gradient_accumulation_steps(),
    }


def autocast(deepspeed_section: dict[str, Any], device: torch.device) -> torch.autocast:
    """The autocast that the engine puts around its forward pass, for a model outside of the engine."""
    if not get_torch_autocast_enabled(deepspeed_section):
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, get_torch_autocast_dtype(deepspeed_section))


def true_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter that ZeRO 3 may have emptied."""
    return getattr(parameter, "ds_shape", parameter.shape)
