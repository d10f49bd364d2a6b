"""A linear map of channels that come last, with oneDNN's products on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def channel_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, (B, H, W, in) or (B, N, in) -> the same with `out` channels, with a weight (out, in).

    On a CPU it is computed as the 1x1 convolution that it equals, in which oneDNN uses AVX-512 where MKL doesn't: on an
    AMD EPYC (family 26) that takes half the time. Exported graphs have the plain operation. Give it rows and columns
    where there are some: torch.compile takes maps of one row for another memory layout, and copies them.
    """
    if not x.is_cpu or x.dtype == torch.float64 or torch.compiler.is_exporting():
        return F.linear(x, weight, bias)
    if x.dim() == 3:
        return channel_linear(x.unsqueeze(1), weight, bias).squeeze(1)
    return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
