"""What a global branch does with positions: the neural memory, and the alternatives the paper compares it with.

A mixer maps (B, H, W, d) to (B, H, W, d) for any H x W. `convneur.model.GlobalBranch` puts each of them into the same
frame: projection C -> d, LayerNorm, mixer, projection d -> C.

Shape legend: B images, H x W positions, N = H*W tokens in raster order, d bottleneck width.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from timm.layers import register_notrace_module
from torch import Tensor, nn

from convneur.memory import MemoryConfig, NeuralMemory

MixerKind = Literal["neural_memory"]


@register_notrace_module
class MemoryMixer(nn.Module):
    """Chunked neural memory, the paper's own; `convneur.memory` explains it."""

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        super().__init__()
        self.memory = NeuralMemory(dim, config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        context = self.memory(x.flatten(1, 2)).view_as(x)
        if self.training:
            # Where an image is a single chunk nothing reads the update. A gradient of zero, instead of none, spares
            # data-parallel wrappers and optimizers a parameter that takes part at some resolutions only. The module
            # is called, its parameters not touched: ZeRO 3 gathers them for the call alone.
            unread = self.memory.update_generator(x.new_zeros(1, x.shape[-1]))
            context = context + 0.0 * sum(factor.sum() for factor in unread)
        return context


class Mixer(NamedTuple):
    """How to build a mixer from its width and the memory's settings, and its default width as a fraction of C."""

    build: Callable[[int, MemoryConfig], nn.Module]
    width_ratio: float


MIXERS: dict[MixerKind, Mixer] = {
    "neural_memory": Mixer(MemoryMixer, 1 / 2),
}
