"""What a model consists of and what it costs, worked out without allocating it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from convneur.data.errors import InputError
from convneur.models.build import build_model, family_of
from convneur.models.convneur.config import OWN, ModelConfig, variant_named


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


class Part(NamedTuple):
    """A module of a model, on its way from an image to the answer.

    Attributes:
        width: channels of the map that it puts out.
        resolution: height and width of that map.
        params: its parameters.
        macs: its multiply-accumulates.
    """

    width: int
    resolution: tuple[int, int]
    params: int
    macs: int


@torch.no_grad()
def count(model: nn.Module, images: Tensor, names: Sequence[str] = ()) -> tuple[int, list[Part]]:
    """Multiply-accumulates of a model on some images, and what is due to modules of it that put out maps (B, C, H, W).

    The names of such modules in a backbone are those of its `feature_info`.
    """
    parts: list[Part] = []
    before: list[int] = []
    counter = FlopCounterMode(display=False)

    def begin(*_: object) -> None:
        before.append(counter.get_total_flops())

    def end(module: nn.Module, _: object, output: Tensor) -> None:
        macs = (counter.get_total_flops() - before.pop()) // 2
        parts.append(Part(output.shape[1], (output.shape[2], output.shape[3]), _params(module), macs))

    modules = [model.get_submodule(name) for name in names]
    handles = [module.register_forward_pre_hook(begin) for module in modules]
    handles += [module.register_forward_hook(end) for module in modules]
    with counter:
        model(images)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() // 2, parts


@cache
def describe(config: ModelConfig, image_size: int = 224) -> ModelInfo:
    """Counts a model's parameters and multiply-accumulates on one square image of `image_size` pixels a side.

    Raises InputError where the image is too small for the last stage.
    """
    if image_size < (smallest := family_of(config).smallest_image):
        raise InputError(f"image size is {image_size}, expected at least {smallest} pixels")
    # Tensors on the meta device are shapes without memory. Attention is written out in matrix products, which are
    # counted.
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = build_model(config).eval()
        images = torch.empty(1, config.in_chans, image_size, image_size)
        stages = [info["module"] for info in model.feature_info] if config.family == OWN else []
        macs, parts = count(model, images, stages)
    infos = tuple(_stage_info(config, stage, part) for stage, part in enumerate(parts))
    return ModelInfo(config.variant, image_size, _params(model), macs / 1e9, infos)


def _stage_info(config: ModelConfig, stage: int, part: Part) -> StageInfo:
    blocks = variant_named(config.variant).depths[stage]
    branches = {"none": 0, "per_stage": 1, "per_layer": blocks}[config.placement]
    has_memory = branches and config.branch == "neural_memory"
    chunk_length = config.stage_memory(stage).chunk_length if has_memory else None
    return StageInfo(
        resolution=part.resolution,
        width=part.width,
        blocks=blocks,
        branches=branches,
        memory_width=config.branch_width(stage) if branches else None,
        chunk_length=chunk_length,
        chunks=math.ceil(math.prod(part.resolution) / chunk_length) if chunk_length else None,
        params=part.params,
        gmacs=part.macs / 1e9,
    )


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
