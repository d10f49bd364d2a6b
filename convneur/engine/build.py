"""DeepSpeed around the model."""

import os
from contextlib import suppress
from importlib import import_module
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import get_torch_autocast_dtype, get_torch_autocast_enabled
from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME, has_comm_dtype
from torch import nn

from convneur.engine.engine import Engine, true_shape
from convneur.engine.loss_scale import mend_loss_scale


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], *, compile: bool = False
) -> Engine:
    """Hands the model and its optimizer to DeepSpeed; the process group exists already.

    The model keeps its contiguous (NCHW) weights: ZeRO 1 and above can't flatten channels_last ones. With `compile` it
    is translated by torch.compile at its first step.
    """
    # On CPUs DeepSpeed compiles a shared-memory all-reduce at start-up. That takes a minute, and a build that was
    # killed leaves a lock on which every later run hangs; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _load_muon()
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    stage = engine.zero_optimization_stage()
    if stage:
        mend_loss_scale(engine)
    if stage == 3:
        _gather_vectors_in_float32(model)
    if engine.bfloat16_enabled() or engine.fp16_enabled():
        # DeepSpeed's own half precision modes convert the parameters, and leave it to the caller to convert the input.
        dtype = next(model.parameters()).dtype
        model.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
    if compile:
        engine.compile()
    return Engine(engine)


def _load_muon() -> None:
    """Loads DeepSpeed's Muon, which ZeRO asks of every optimizer whether it is, without translating it.

    Its functions stand under torch.compile, whose compiler takes 1.6 s of every rank's start to load. No run uses
    them.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with suppress(ImportError):  # as DeepSpeed, which then goes without
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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


def autocast(deepspeed_section: dict[str, Any], device: torch.device) -> torch.autocast:
    """The autocast that the engine puts around its forward pass, for a model outside of the engine."""
    if not get_torch_autocast_enabled(deepspeed_section):
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, get_torch_autocast_dtype(deepspeed_section))
