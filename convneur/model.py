"""ConvNeur: a convolutional backbone whose local features are gated by a chunked neural memory.

Source: "Efficiency Follows Global-Local Decoupling", CVPR 2026 (arXiv 2603.19567). The paper gives the equations and
the totals of M1-M4, not widths and depths: `VARIANTS` is a reconstruction. It takes stem, downsampling and blocks
from ConvNeXt (arXiv 2201.03545), halves the channels for the memory, and is the one assignment found that explains
all four published parameter counts (4.3, 6.1, 10.6 and 18.1 M). N1-N3 and M5-M9 continue it below and above.

Shape legend: B images, C channels of a stage, H x W positions, N = H*W tokens, d = C/2 memory width.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from torch import Tensor, nn

from convneur.memory import MemoryConfig, NeuralMemory

Placement = Literal["none", "per_stage", "per_layer"]


@dataclass(frozen=True)
class Variant:
    """Blocks a stage and the width of the first stage; the width doubles every stage."""

    depths: tuple[int, int, int, int]
    base_width: int


VARIANTS = {
    "n1": Variant((2, 2, 6, 2), 16),
    "n2": Variant((2, 2, 6, 2), 24),
    "n3": Variant((2, 2, 6, 2), 32),
    "m1": Variant((2, 2, 6, 2), 40),
    "m2": Variant((2, 2, 6, 2), 48),
    "m3": Variant((2, 2, 6, 2), 64),
    "m4": Variant((2, 2, 8, 2), 80),
    "m5": Variant((3, 3, 9, 3), 96),
    "m6": Variant((3, 3, 27, 3), 96),
    "m7": Variant((3, 3, 27, 3), 128),
    "m8": Variant((3, 3, 27, 3), 192),
    "m9": Variant((3, 3, 27, 3), 256),
}


@dataclass(frozen=True)
class ModelConfig:
    """What to build.

    Attributes:
        variant: a row of VARIANTS, n1..n3 or m1..m9.
        num_classes: outputs of the head.
        in_chans: channels of the input image.
        placement: where memory branches sit: in no block (the local-only control), in the first block of every stage
            (paper's default), or in every block.
        memory: settings of the neural memory.
        drop_path: stochastic-depth rate of the last block; rises linearly from 0 at the first.
        layer_scale: initial value of the per-channel scale of a block's local features.
    """

    variant: str = "m4"
    num_classes: int = 1000
    in_chans: int = 3
    placement: Placement = "per_stage"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    drop_path: float = 0.0
    layer_scale: float = 1e-6

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"model.variant is {self.variant!r}, expected one of {', '.join(VARIANTS)}")


class GlobalBranch(nn.Module):
    """Global context G of the whole image at a fraction of its width.

    Bottleneck C -> d, tokens in raster order, neural memory, recomposition, d -> C. (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        super().__init__()
        width = dim // 2
        self.reduce = nn.Linear(dim, width)
        self.norm = nn.LayerNorm(width)
        self.memory = NeuralMemory(width, config)
        self.expand = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.reduce(x.flatten(1, 2)))  # (B, N, d)
        return self.expand(self.memory(tokens)).view_as(x)


class LocalBranch(nn.Module):
    """F_loc: large-kernel depthwise convolution, then channel mixing, as a ConvNeXt block. (B, C, H, W) in, NHWC out."""

    def __init__(self, dim: int, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return self.scale * self.down(self.act(self.up(y)))


class Block(nn.Module):
    """F_out = X + DropPath(A * F_loc), with the gate A = sigmoid(G) where the block has a global branch."""

    def __init__(self, dim: int, memory: MemoryConfig | None, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.local_branch = LocalBranch(dim, layer_scale)
        self.global_branch = GlobalBranch(dim, memory) if memory is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features = self.local_branch(x)
        if self.global_branch is not None:
            gate = self.global_branch(x.permute(0, 2, 3, 1)).sigmoid()
            features = gate * features
        return x + self.drop_path(features.permute(0, 3, 1, 2))


class ConvNeur(nn.Module):
    """Four stages of blocks between a patchifying stem and a linear head. (B, in_chans, H, W) -> (B, num_classes).

    Takes any input of at least 32 x 32 pixels; give it channels_last images, its blocks then move no data.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        variant = VARIANTS[config.variant]
        widths = [variant.base_width << stage for stage in range(4)]
        total = sum(variant.depths)
        drop_rates = [config.drop_path * i / (total - 1) for i in range(total)]

        self.downsample = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(config.in_chans, widths[0], kernel_size=4, stride=4), LayerNorm2d(widths[0]))]
        )
        for narrow, wide in zip(widths[:3], widths[1:], strict=True):
            self.downsample.append(nn.Sequential(LayerNorm2d(narrow), nn.Conv2d(narrow, wide, kernel_size=2, stride=2)))

        self.stages = nn.ModuleList()
        for width, depth in zip(widths, variant.depths, strict=True):
            blocks = []
            for i in range(depth):
                has_memory = config.placement == "per_layer" or (config.placement == "per_stage" and i == 0)
                blocks.append(
                    Block(width, config.memory if has_memory else None, drop_rates.pop(0), config.layer_scale)
                )
            self.stages.append(nn.Sequential(*blocks))

        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], config.num_classes)
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 8 C_1, H/32, W/32)."""
        for downsample, stage in zip(self.downsample, self.stages, strict=True):
            x = stage(downsample(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.forward_features(x).mean((-2, -1))))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
