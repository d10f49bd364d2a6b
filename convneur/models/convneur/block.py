"""A block, where the global branch gates the local one, and a stage of blocks at one resolution.

Shape legend: B images, C channels of a stage, H x W positions.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, LayerNorm2d
from timm.models import checkpoint_seq
from torch import Tensor, nn

from convneur.models.convneur import inference
from convneur.models.convneur.branches import GlobalBranch, LocalBranch
from convneur.models.convneur.config import Fusion, ModelConfig, variant_named
from convneur.models.convneur.mixers import MIXERS
from convneur.models.layers import ChannelLinear


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
        self.project: nn.Module = ChannelLinear(2 * dim, dim) if concatenates else nn.Identity()
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript reads what follows an `and`)
            if inference.takes(self, x):
                return inference.run_block(self, x)
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
            return GlobalBranch(dim, width, MIXERS[config.branch](width, config.stage_memory(stage)))

        self.blocks = nn.Sequential(
            *(Block(dim, global_branch(i), config.fusion, rate, config.layer_scale) for i, rate in enumerate(drop_path))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C/2, 2H, 2W) -> (B, C, H, W); in the first stage (B, C, H, W) -> (B, C, H, W)."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
