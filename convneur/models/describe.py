"""What a model consists of and what it costs, worked out without allocating it."""

import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from convneur.data.errors import InputError
from convneur.models.build import build_model, family_of
from convneur.models.convneur.block import Stage
from convneur.models.convneur.config import ModelConfig, variant_named
from convneur.models.convneur.model import ConvNeur


@dataclass(frozen=True)
class StageInfo:
    """One of the four stages.

    Attributes:
        resolution: height and width of its feature map.
        width: its channels C.
        blocks: its blocks.
        branches: those of its blocks that have a global branch.
        memory_width: bottleneck width d of a global branch; None without one.
        chunk_length: tokens in a full chunk of the memory, L; None without one.
        chunks: chunks that the memory reads one after another, T = ceil(H W / L); None without one.
        params: its parameters.
        gmacs: its billions of multiply-accumulates an image.
    """

    resolution: tuple[int, int]
    width: int
    blocks: int
    branches: int
    memory_width: int | None
    chunk_length: int | None
    chunks: int | None
    params: int
    gmacs: float


@dataclass(frozen=True)
class ModelInfo:
    """A model.

    Attributes:
        variant: its name.
        image_size: side of the square image that it is looked at with.
        params: its parameters.
        gmacs: billions of multiply-accumulates an image, of matrix products and convolutions alone, as papers count.
        stages: the four stages of a ConvNeur; stem and head are in the totals only.
    """

    variant: str
    image_size: int
    params: int
    gmacs: float
    stages: tuple[StageInfo, ...]


@torch.no_grad()
def describe(config: ModelConfig, image_size: int = 224) -> ModelInfo:
    """Counts a model's parameters and multiply-accumulates on one square image of `image_size` pixels a side.

    Raises InputError where the image is too small for the last stage.
    """
    if image_size < (smallest := family_of(config).smallest_image):
        raise InputError(f"image size is {image_size}, expected at least {smallest} pixels")
    stages: list[StageInfo] = []
    macs: list[int] = []
    # Fake tensors are shapes without memory; the meta device fails under the memory's autocast. Attention is written
    # out in matrix products, because torch 2.11 does not count the CPU's fused one.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model = build_model(config).eval()
        x = torch.empty(1, config.in_chans, image_size, image_size)
        parts = (model.stem, *model.stages, model.forward_head) if isinstance(model, ConvNeur) else (model,)
        for part in parts:
            with FlopCounterMode(display=False) as counter:
                x = part(x)
            macs.append(counter.get_total_flops() // 2)
            if isinstance(part, Stage):
                stages.append(_describe_stage(config, len(stages), (x.shape[2], x.shape[3]), _params(part), macs[-1]))
    return ModelInfo(config.variant, image_size, _params(model), sum(macs) / 1e9, tuple(stages))


def _describe_stage(config: ModelConfig, stage: int, resolution: tuple[int, int], params: int, macs: int) -> StageInfo:
    variant = variant_named(config.variant)
    blocks = variant.depths[stage]
    branches = {"none": 0, "per_stage": 1, "per_layer": blocks}[config.placement]
    has_memory = branches and config.branch == "neural_memory"
    chunk_length = config.stage_memory(stage).chunk_length if has_memory else None
    return StageInfo(
        resolution=resolution,
        width=variant.widths[stage],
        blocks=blocks,
        branches=branches,
        memory_width=config.branch_width(stage) if branches else None,
        chunk_length=chunk_length,
        chunks=math.ceil(math.prod(resolution) / chunk_length) if chunk_length else None,
        params=params,
        gmacs=macs / 1e9,
    )


def _params(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
