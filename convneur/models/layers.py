"""Layers that are PyTorch's own but for the time they take on a CPU. Nothing in them is of one model."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from convneur.ops.depthwise import depthwise_conv2d
from convneur.ops.linear import channel_linear


@register_notrace_module
class ChannelLinear(nn.Linear):
    """nn.Linear by way of `channel_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in) or (B, N, in) -> the same with `out` channels."""
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        else:
            return channel_linear(x, self.weight, self.bias)


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """A K x K depthwise convolution that keeps H x W; nn.Conv2d, but for the time its backward pass takes on a CPU."""

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__(dim, dim, kernel_size=taps, padding=taps // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:
            return depthwise_conv2d(x, self.weight, self.bias)
