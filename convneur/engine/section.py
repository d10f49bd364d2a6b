"""DeepSpeed's configuration: the `deepspeed` section as it is, completed with what the other sections settle.

DeepSpeed 0.19.8 takes unknown top-level keys in silence, so they are checked here. Inside its sections it refuses them,
but only once the model exists: `parse_with_deepspeed` asks it beforehand. Importing this module loads neither DeepSpeed
nor PyTorch.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convneur.data.errors import InputError
from convneur.settings import nearest_key

if TYPE_CHECKING:
    from pydantic import ValidationError

# What deepspeed.runtime.config.DeepSpeedConfig reads; a test watches it read.
# fmt: off
KNOWN_KEYS = frozenset([
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "memory_breakdown", "pipeline", "prescale_gradients",
    "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel", "tensorboard", "timers",
    "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism",
    "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
])
# fmt: on

REFUSED_KEYS = {
    "optimizer": "the optimizer section of the configuration sets the optimizer",
    "scheduler": "the schedule section of the configuration sets the learning rate",
    "managed_gradient_accumulation": "train.accumulation relies on DeepSpeed's own accumulation",
    "amp": "NVIDIA has taken apex.amp out of apex, and DeepSpeed has dropped it; use deepspeed.torch_autocast",
}


HALVES = ("bf16", "bfloat16")
"""The two names of the section of DeepSpeed's own bfloat16 mode."""

# Elements of a bucket of gradients. DeepSpeed's 500 million take 2 GB, under autocast twice, however small the model.
BUCKET = 2**24

# Layers whose gradients are reduced in autocast's precision.
LOWER_PRECISION_MODULES = [
    "torch.nn.Linear",
    "torch.nn.Conv2d",
    "convneur.models.layers.ChannelLinear",
    "convneur.models.layers.DepthwiseConv2d",
]


@dataclass(frozen=True)
class Settled:
    """What other sections of the configuration settle for DeepSpeed.

    Attributes:
        global_batch_size: images of an optimizer step.
        accumulation: micro-batches of a step.
        clip_grad: largest global gradient norm; 0 for no clipping.
        world_size: ranks.
    """

    global_batch_size: int
    accumulation: int
    clip_grad: float
    world_size: int


def complete(free: dict[str, Any], settled: Settled) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        free: the deepspeed section as the configuration has it; it stays as it is.
        settled: what the other sections say.

    Raises:
        InputError: the section contradicts the rest of the configuration, holds a key that DeepSpeed doesn't know, or
            asks for a mode that doesn't work.
    """
    section = copy.deepcopy(free)
    _check_keys(section)
    _check_precision(section)
    for key, (value, source) in _values(settled).items():
        if section.setdefault(key, value) != value:
            raise InputError(f"deepspeed.{key} is {section[key]!r}, but {source} makes it {value}: leave it out")
    section.setdefault("zero_optimization", {}).setdefault("reduce_bucket_size", BUCKET)
    if offloads_optimizer(section):
        section.setdefault("zero_force_ds_cpu_optimizer", False)  # optimizer.implementation decides
    for key in HALVES:
        if section.get(key, {}).get("enabled", False):  # it would add gradients up in bfloat16
            section["data_types"] = {"grad_accum_dtype": "fp32"} | section.get("data_types", {})
    if section.get("torch_autocast", {}).get("enabled", False):  # DeepSpeed looks for exact classes
        section["torch_autocast"].setdefault("lower_precision_safe_modules", LOWER_PRECISION_MODULES)
    # DeepSpeed's own throughput timer waits for the device at every micro-batch.
    section.setdefault("timers", {"throughput": {"enabled": False}})
    return section


def offloads_optimizer(section: dict[str, Any]) -> bool:
    """Whether the deepspeed section keeps optimizer state, and runs the optimizer, on the CPU."""
    offload = section.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def parse_with_deepspeed(section: dict[str, Any]) -> None:
    """Lets DeepSpeed parse a complete configuration, without a process group; InputError where it refuses a key."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    # Alone, it would hold the batch sizes against a world of one.
    alone = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(section | alone)
    except ValidationError as error:
        raise InputError(_refusal(section, error)) from error
    except Exception as error:  # it raises what it pleases, AssertionError and KeyError included
        raise InputError(f"DeepSpeed refuses the deepspeed section: {' '.join(str(error).split())}") from error


def _refusal(section: dict[str, Any], error: "ValidationError") -> str:
    """The first thing that one of DeepSpeed's pydantic models has against the section."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    first = error.errors()[0]
    parents = [key for key, value in section.items() if isinstance(value, dict) and first["loc"][0] in value]
    name = ".".join(map(str, (*parents[:1], *first["loc"])))
    message = f"deepspeed.{name} is {first['input']!r}, which DeepSpeed refuses: {first['msg']}"
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        models = [model for model in DeepSpeedConfigModel.__subclasses__() if model.__name__ == error.title]
        nearest = nearest_key(str(first["loc"][0]), models[0].model_fields) if models else None
        message = f"deepspeed.{name} is not a key of DeepSpeed"
        message += f"; did you mean deepspeed.{'.'.join([*parents[:1], nearest])}?" if nearest else ""
    return message


def _values(settled: Settled) -> dict[str, tuple[float, str]]:
    """Keys that other sections settle: value, and where it comes from."""
    accumulation, world_size = settled.accumulation, settled.world_size
    micro_batch, rest = divmod(settled.global_batch_size, world_size * accumulation)
    if rest or not micro_batch:
        raise InputError(
            f"data.global_batch_size is {settled.global_batch_size}, expected a multiple of"
            f" {world_size * accumulation} ({world_size} ranks x train.accumulation {accumulation})"
        )
    return {
        "train_batch_size": (settled.global_batch_size, "data.global_batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch, f"data.global_batch_size on {world_size} ranks"),
        "gradient_accumulation_steps": (accumulation, "train.accumulation"),
        "gradient_clipping": (settled.clip_grad, "optimizer.clip_grad"),
    }


def _check_keys(section: dict[str, Any]) -> None:
    for key in section:
        if key in REFUSED_KEYS:
            raise InputError(f"deepspeed.{key} can't be set: {REFUSED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            nearest = nearest_key(str(key), KNOWN_KEYS)
            hint = f"did you mean deepspeed.{nearest}?" if nearest else "see deepspeed.ai/docs/config-json"
            raise InputError(f"deepspeed.{key} is not a key of DeepSpeed; {hint}")
    for key in ("zero_optimization", "bf16", "bfloat16", "fp16", "torch_autocast"):
        if not isinstance(section.get(key, {}), dict):
            raise InputError(f"deepspeed.{key} is {section[key]!r}, expected keys below it")


def _check_precision(section: dict[str, Any]) -> None:
    stage = section.get("zero_optimization", {}).get("stage", 0)
    if not isinstance(section.get("zero_optimization", {}).get("offload_optimizer") or {}, dict):
        raise InputError("deepspeed.zero_optimization.offload_optimizer is no mapping, expected keys such as device")
    if stage == 0 and offloads_optimizer(section):
        raise InputError(
            "deepspeed.zero_optimization.offload_optimizer is set at ZeRO stage 0, which keeps all of it on the device:"
            " use deepspeed.zero_optimization.stage 1 or more"
        )
    for parent, key in (("zero_optimization", "compute_grad_norm"), *((h, "check_grad_overflow") for h in HALVES)):
        if section.get(parent, {}).get(key, True) is False:
            raise InputError(
                f"deepspeed.{parent}.{key} is false, but a run skips steps whose gradients aren't finite, and that is"
                " how DeepSpeed finds them: leave it out"
            )
    for key in (*HALVES, "fp16"):
        if not section.get(key, {}).get("enabled", False):
            continue
        if stage == 0:  # initialisation would run an optimizer step: weight decay before training
            raise InputError(
                f"deepspeed.{key} is enabled at ZeRO stage 0, where DeepSpeed is broken:"
                " use deepspeed.torch_autocast, or deepspeed.zero_optimization.stage 1 or more"
            )
        if key == "fp16" and not _has_cuda():
            raise InputError(
                "deepspeed.fp16 is enabled without a CUDA device: use deepspeed.torch_autocast with dtype bfloat16"
            )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
