"""What a model promises to those who train it, and a backbone to those who build a task's model around it.

These are the promises of timm's models, so any of them keeps them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn


class Model(nn.Module):
    """What training asks of a model beside its forward pass."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations again in the backward pass: less memory, the same bits."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that don't decay, beside vectors and scalars."""
        return set()


class Backbone(Model):
    """A classifier of images that shows its feature maps.

    Shape legend: B images of H x W pixels, L levels, level l of C_l channels at 1 / r_l of the resolution.

    Attributes:
        feature_info: of each level, finest first: its channels C_l as "num_chs" and its reduction r_l as "reduction".
    """

    if TYPE_CHECKING:  # TorchScript reads a module's annotations, and doesn't know these types
        feature_info: Sequence[dict[str, Any]]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Images (B, 3, H, W) to the maps (B, C_l, H / r_l, W / r_l) of the levels in `indices`, and the last one.

        Args:
            x: the images.
            indices: levels, or how many of the last; None for all.
            norm: whether the last norm is applied to them.
            stop_early: whether to leave out what comes after the last of them.
            output_fmt: order of the axes.
            intermediates_only: whether to leave out the last map.
        """
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the last map, before pooling."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (B, K), or to what the classifier takes."""
        raise NotImplementedError
