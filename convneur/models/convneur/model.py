"""ConvNeur: a convolutional backbone whose local features are gated by a chunked neural memory.

Source: "Efficiency Follows Global-Local Decoupling", CVPR 2026 (arXiv 2603.19567). The paper gives the equations and
the totals of M1-M4, not widths and depths: `VARIANTS` is a reconstruction. It takes stem, downsampling and blocks
from ConvNeXt (arXiv 2201.03545), halves the channels for the memory, and is the one assignment found that explains
all four published parameter counts (4.3, 6.1, 10.6 and 18.1 M). N1-N3 and M5-M9 continue it below and above.

Shape legend: B images, C channels of a stage, H x W positions, d bottleneck width of the global branch (C/2 for the
neural memory).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from convneur.models.backbone import Backbone
from convneur.models.convneur import inference, mup
from convneur.models.convneur.memory import MemoryConfig
from convneur.models.convneur.mixers import MIXERS, MixerKind
from convneur.ops.depthwise import DepthwiseConv2d
from convneur.ops.linear import ChannelLinear
from convneur.ops.memory.reading import ReadOrder

Placement = Literal["none", "per_stage", "per_layer"]
Fusion = Literal["gate", "add", "concat"]
GlobalPool = Literal["avg", "max", "avgmax", ""]


@dataclass(frozen=True)
class Variant:
    """Blocks a stage and the width of the first stage; the width doubles every stage."""

    depths: tuple[int, int, int, int]
    base_width: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels C of the four stages."""
        return tuple(self.base_width << stage for stage in range(4))


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

LARGEST = 10**9
WIDEST, DEEPEST = 9998, 999  # of a free shape: what is larger is a slip, and would take hours to be looked at
FREE_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)-([1-9]\d*)-([1-9]\d*)-([1-9]\d*)")


def variant_named(name: str, key: str = "model.variant") -> Variant:
    """A row of VARIANTS, or what a free name such as "24x2-2-6-2" says: first width, then the blocks of each stage.

    Raises ValueError, which calls the setting `key`, where it is neither; widths are even, because the memory's
    bottleneck is half of one.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    match = FREE_SHAPE.fullmatch(name)
    if match is None or int(match[1][-1]) % 2:
        raise ValueError(
            f"{key} is {name!r}, expected one of {', '.join(map(repr, VARIANTS))}, or an even first width and"
            " the blocks of the four stages, such as '24x2-2-6-2'"
        )
    base_width, *depths = (int(number[:9]) for number in match.groups())
    if base_width > WIDEST or max(depths) > DEEPEST:
        raise ValueError(f"{key} is {name!r}, expected a width of at most {WIDEST} and depths of at most {DEEPEST}")
    return Variant((depths[0], depths[1], depths[2], depths[3]), base_width)


SMALLEST_IMAGE = 32  # pixels a side: the stages reduce it by 4, 8, 16 and 32


@dataclass(frozen=True)
class ModelConfig:
    """What to build.

    Attributes:
        variant: a row of VARIANTS, n1..n3 or m1..m9, or a shape of its own: "24x2-2-6-2" has 24 channels in the first
            stage and 2, 2, 6 and 2 blocks in the four.
        num_classes: outputs of the head; 0 for no classifier.
        in_chans: channels of the input image.
        placement: where global branches sit: in no block (the local-only control), in the first block of every stage
            (paper's default), or in every block.
        branch: what the global branch computes; `convneur.models.convneur.mixers` has them all.
        fusion: how the global context G meets the local features: "gate" (paper's default) multiplies them by
            sigmoid(G), "add" adds G, "concat" concatenates G and projects back to C.
        memory: settings of the neural memory.
        chunk_lengths: chunk length of each stage, where the stages differ; null for memory.chunk_length in all.
        inner_lrs: scale of the inner step size in each stage, where the stages differ; null for memory.inner_lr in all.
        branch_widths: bottleneck width d of each stage; null for the branch's own fraction of C.
        global_pool: pooling before the head; "" for none (a map of logits).
        drop_rate: dropout before the classifier.
        drop_path: stochastic-depth rate of the last block; rises linearly from 0 at the first.
        layer_scale: initial value of the per-channel scale of a block's residual.
        mup_base: variant or shape at whose width optimizer.lr was chosen; muP (mup.py) then carries it over to
            the width of this one. Empty for the standard parametrization.
    """

    variant: str = "m4"
    num_classes: int = 1000
    in_chans: int = 3
    placement: Placement = "per_stage"
    branch: MixerKind = "neural_memory"
    fusion: Fusion = "gate"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    chunk_lengths: tuple[int, int, int, int] | None = None
    inner_lrs: tuple[float, float, float, float] | None = None
    branch_widths: tuple[int, int, int, int] | None = None
    global_pool: GlobalPool = "avg"
    drop_rate: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 1e-6
    mup_base: str = ""

    def __post_init__(self) -> None:
        variant_named(self.variant)
        choices = {
            "placement": get_args(Placement),
            "branch": get_args(MixerKind),
            "fusion": get_args(Fusion),
            "global_pool": get_args(GlobalPool),
            "memory.read": get_args(ReadOrder),
        }
        for key, allowed in choices.items():
            if (value := attrgetter(key)(self)) not in allowed:
                raise ValueError(f"model.{key} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
        for key, least in {"num_classes": 0, "in_chans": 1, "memory.chunk_length": 1, "memory.inner_lr": 0}.items():
            if not least <= (value := attrgetter(key)(self)) < inf:
                raise ValueError(f"model.{key} is {value}, expected at least {least}")
            if value > LARGEST:
                raise ValueError(f"model.{key} is {value}, expected at most {LARGEST:,}")
        for key in ("drop_rate", "drop_path"):
            if not 0 <= (value := getattr(self, key)) < 1:
                raise ValueError(f"model.{key} is {value}, expected a rate in [0, 1)")
        for key in ("chunk_lengths", "inner_lrs", "branch_widths"):
            values = getattr(self, key)
            if values is not None and (len(values) != 4 or min(values) <= 0):
                raise ValueError(f"model.{key} is {list(values)}, expected four numbers above 0, one a stage")
        if self.mup_base:
            self._check_mup()

    def _check_mup(self) -> None:
        variant_named(self.mup_base, "model.mup_base")
        if self.placement != "none" and self.branch != "neural_memory":
            raise ValueError(
                f"model.mup_base is {self.mup_base!r} with model.branch {self.branch!r}, for which no scaling with the"
                " width was derived: use neural_memory, model.placement none, or leave model.mup_base out"
            )
        if self.branch_widths is not None:
            raise ValueError(
                f"model.mup_base is {self.mup_base!r} with model.branch_widths {list(self.branch_widths)}, expected"
                " null: the widths of the branches have to grow with the others"
            )

    @property
    def width_factor(self) -> float:
        """Width as a multiple of that of mup_base; 1 without."""
        return variant_named(self.variant).base_width / variant_named(self.mup_base or self.variant).base_width

    @property
    def depth_warning(self) -> str | None:
        """What has to be said where the depths aren't those of mup_base, over which muP carries no learning rate."""
        depths, base = (variant_named(name or self.variant).depths for name in (self.variant, self.mup_base))
        if depths == base:
            return None
        return (
            f"{'-'.join(map(str, depths))} blocks, model.mup_base {self.mup_base} {'-'.join(map(str, base))}: muP"
            " carries a learning rate over widths, not over depths; try some around it"
        )

    def branch_width(self, stage: int) -> int:
        """Bottleneck width d of a stage's global branch."""
        if self.branch_widths is not None:
            return self.branch_widths[stage]
        return round(variant_named(self.variant).widths[stage] * MIXERS[self.branch].width_ratio)

    def stage_memory(self, stage: int) -> MemoryConfig:
        """Settings of a stage's neural memory."""
        inner_lr = self.inner_lrs[stage] if self.inner_lrs else self.memory.inner_lr
        return replace(
            self.memory,
            chunk_length=self.chunk_lengths[stage] if self.chunk_lengths else self.memory.chunk_length,
            inner_lr=inner_lr * self.width_factor**mup.INNER_LR,
        )


class LocalBranch(nn.Module):
    """F_loc: large-kernel depthwise convolution, then channel mixing, as in a ConvNeXt block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, taps=7)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = ChannelLinear(dim, 4 * dim)
        self.act = nn.GELU()
        self.down = ChannelLinear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W, C)."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return self.down(self.act(self.up(y)))


class GlobalBranch(nn.Module):
    """G: context of the whole image, computed at a fraction of its width.

    Bottleneck C -> d, mixing of positions (the neural memory, or one of the alternatives it is compared with),
    recomposition d -> C. A mixer that works at full width, d = C, has no bottleneck to enter.
    """

    def __init__(self, dim: int, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.reduce = ChannelLinear(dim, width) if width != dim else nn.Identity()
        self.norm = nn.LayerNorm(width)
        self.mixer = mixer  # (B, H, W, d) -> (B, H, W, d)
        self.expand = ChannelLinear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.expand(self.mixer(self.norm(self.reduce(x))))


class Block(nn.Module):
    """F_out = X + DropPath(gamma * A * F_loc), with the gate A = sigmoid(G) where the block has a global branch.

    gamma is ConvNeXt's layer scale. The ablations of the gate put F_loc + G or W[F_loc, G] in the place of A * F_loc.
    """

    def __init__(
        self, dim: int, global_branch: GlobalBranch | None, fusion: Fusion, drop_path: float, layer_scale: float
    ) -> None:
        super().__init__()
        self.local_branch = LocalBranch(dim)
        self.global_branch = global_branch
        self.fusion = fusion
        concatenates = global_branch is not None and fusion == "concat"
        self.project = ChannelLinear(2 * dim, dim) if concatenates else nn.Identity()
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript reads what follows an `and`)
            if inference.takes(self, x):
                return inference.forward(self, x)
        features = self.local_branch(x)
        if self.global_branch is not None:
            context = self.global_branch(x.permute(0, 2, 3, 1))
            if self.fusion == "gate":
                features = context.sigmoid() * features
            elif self.fusion == "add":
                features = features + context
            else:
                features = self.project(torch.cat([features, context], dim=-1))
        return torch.addcmul(x.permute(0, 2, 3, 1), self.drop_path(features), self.gamma).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A run of blocks at one resolution; all but the first stage halve it before."""

    def __init__(self, config: ModelConfig, stage: int, drop_path: Sequence[float]) -> None:
        super().__init__()
        dim = variant_named(config.variant).widths[stage]
        self.grad_checkpointing = False
        self.downsample = (
            nn.Sequential(LayerNorm2d(dim // 2), nn.Conv2d(dim // 2, dim, kernel_size=2, stride=2))
            if stage > 0
            else nn.Identity()
        )

        def global_branch(block: int) -> GlobalBranch | None:
            if config.placement == "none" or (config.placement == "per_stage" and block > 0):
                return None
            width = config.branch_width(stage)
            return GlobalBranch(dim, width, MIXERS[config.branch].build(width, config.stage_memory(stage)))

        self.blocks = nn.Sequential(
            *(Block(dim, global_branch(i), config.fusion, rate, config.layer_scale) for i, rate in enumerate(drop_path))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C/2, 2H, 2W) -> (B, C, H, W); in the first stage (B, C, H, W) -> (B, C, H, W)."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class ConvNeur(Backbone):
    """Four stages of blocks between a patchifying stem and a linear head.

    Takes any input of at least 32 x 32 pixels; give it channels_last images, its blocks then move no data.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.in_chans = config.in_chans
        self.num_classes = config.num_classes
        variant = variant_named(config.variant)
        widths, depth = variant.widths, sum(variant.depths)
        drop_path = [config.drop_path * block / (depth - 1) for block in range(depth)]

        self.stem = nn.Sequential(
            nn.Conv2d(config.in_chans, widths[0], kernel_size=4, stride=4), LayerNorm2d(widths[0])
        )
        first = [sum(variant.depths[:stage]) for stage in range(5)]
        self.stages = nn.Sequential(
            *(Stage(config, stage, drop_path[first[stage] : first[stage + 1]]) for stage in range(4))
        )
        self.feature_info = [
            {"num_chs": width, "reduction": 4 << stage, "module": f"stages.{stage}"}
            for stage, width in enumerate(widths)
        ]
        self.num_features = self.head_hidden_size = widths[-1]
        self.head = NormMlpClassifierHead(
            self.num_features, config.num_classes, pool_type=config.global_pool, drop_rate=config.drop_rate
        )
        self.apply(_init_weights)
        if config.mup_base:
            mup.scale_initial_weights(self, config.width_factor)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H/32, W/32)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools, normalises and classifies features, (B, num_features, H/32, W/32) -> (B, num_classes).

        With pre_logits it stops short of the classifier: (B, num_features).
        """
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    # The rest is timm's interface to a backbone.

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Also returns what stages put out, finest first: all, the last n, or those at the given indices.

        norm changes nothing, because the only norm after the stages follows the pooling. stop_early leaves out the
        stages after the last one asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, expected 'NCHW'")
        wanted, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages behind the last of the indices, and then the head too. Returns the indices, from 0."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = variant_named(self.config.variant).widths[last]
        if shortened or prune_head:
            self.num_classes = 0
            self.head.reset(0, "", reset_other=True, in_features=self.num_features)
        return wanted

    def get_classifier(self) -> nn.Module:
        """The last layer, or an identity where there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one, and the pooling if one is given; 0 classes removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Patterns that sort parameters into layers, for layer-wise learning rates: a layer is a block, or a stage."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def mup_groups(self, weight_decay: float, eps: float) -> list[dict[str, Any]] | None:
        """Groups of parameters for AdamW under muP (mup.py); None where model.mup_base isn't set."""
        if not self.config.mup_base:
            return None
        return mup.parameter_groups(self, self.config.width_factor, weight_decay, eps)

    def no_weight_decay(self) -> set[str]:
        """Matrices that are no weights: tokens that a mixer learns. Vectors are exempt from decay anyway."""
        return {name for name, _ in self.named_parameters() if name.endswith("persistent_tokens")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes every block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
