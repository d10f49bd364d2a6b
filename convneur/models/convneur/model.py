"""ConvNeur: a convolutional backbone whose local features are gated by a chunked neural memory.

Source: "Efficiency Follows Global-Local Decoupling", CVPR 2026 (arXiv 2603.19567). Stem, downsampling and the local
branch are those of ConvNeXt (arXiv 2201.03545). `config.py` says where widths and depths come from.

Overall architecture. An image becomes patches of 4 x 4 pixels (the stem). Four stages of blocks follow; every stage but
the first halves the resolution and doubles the width before. The last map is pooled, normalised and classified (the
head). The map that stage s = 0..3 puts out has C = base_width 2^s channels at 1 / (4 2^s) of the image's resolution.

A block (`block.py`) gives a map X to two branches (`branches.py`) that share no features, and lets one gate the other:

    F_loc = local branch of X      edges and textures: a 7 x 7 depthwise convolution, then channel mixing
    G     = global branch of X     the whole image: C -> d, a neural memory over chunks of tokens, d -> C
    A     = sigmoid(G)             what of the local features is to pass, position by position
    F_out = X + DropPath(gamma * A * F_loc)

So the global branch, which works at a fraction d of the width, modulates local features and never overwrites them. It
sits in the first block of every stage (`placement`), since context changes slowly from block to block; the other blocks
have A = 1. gamma is ConvNeXt's layer scale. The memory's equations are in `convneur.ops.memory.equations`.

Shape legend: B images, C channels of a stage, H x W positions, d bottleneck width of the global branch.
"""

from itertools import islice
from typing import Any

from timm.layers import LayerNorm2d, NormMlpClassifierHead, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from convneur.models.backbone import Backbone
from convneur.models.convneur import mup
from convneur.models.convneur.block import Stage
from convneur.models.convneur.config import ModelConfig, variant_named


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
        widths = variant.widths
        self.stem = nn.Sequential(
            nn.Conv2d(config.in_chans, widths[0], kernel_size=4, stride=4), LayerNorm2d(widths[0])
        )
        self.stages = nn.Sequential(
            *(Stage(config, stage, rates) for stage, rates in enumerate(_drop_path_rates(config)))
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


def _drop_path_rates(config: ModelConfig) -> list[list[float]]:
    """Stochastic-depth rates of each stage's blocks: from 0 at the first block linearly to drop_path at the last."""
    depths = variant_named(config.variant).depths
    rates = (config.drop_path * block / (sum(depths) - 1) for block in range(sum(depths)))
    return [list(islice(rates, depth)) for depth in depths]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
