"""The two branches of a block: what stays local, and what comes from the whole image.

Shape legend: B images, C channels of a stage, H x W positions, d bottleneck width of the global branch (C/2 for the
neural memory).
"""

from torch import Tensor, nn

from convneur.models.layers import ChannelLinear, DepthwiseConv2d


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
