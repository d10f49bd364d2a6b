"""A depthwise convolution whose weights' gradient does not take ten times as long as the convolution itself.

Shape legend: B images, C channels, H x W positions, K x K taps (K odd).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convneur.ops.transformed import is_transformed

# It generates code for such kernels where a CPU has AVX2 or AVX-512; what it does elsewhere was not measured.
ONEDNN_IS_FAST = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@torch.library.custom_op("convneur::depthwise_weight_gradient", mutates_args=())
def weight_gradient(x: Tensor, dy: Tensor, taps: int) -> Tensor:
    """Gradient (C, 1, K, K) of the weights, from the input of a depthwise convolution and dy, both (B, C, H, W).

    A channel's is its input correlated with its output's gradient: again a depthwise convolution, whose kernel is as
    large as the image and whose output has K x K positions. oneDNN does that 4 to 6 times as fast on a core of an AMD
    EPYC as what it has for the purpose. An image at a time stays in the cache.
    """
    channels = x.shape[1]
    total = x.new_zeros(1, channels, taps, taps)
    for i in range(len(x)):
        total += F.conv2d(x[i : i + 1], dy[i : i + 1].transpose(0, 1), padding=taps // 2, groups=channels)
    return total.transpose(0, 1).contiguous()


@weight_gradient.register_fake
def _(x: Tensor, dy: Tensor, taps: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, taps, taps)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, d_weight: Tensor) -> tuple[Tensor, Tensor, None]:
    """Gradients of x and dy, for second derivatives: the correlation is linear in both."""
    x, dy = ctx.saved_tensors
    padding, groups = d_weight.shape[-1] // 2, len(d_weight)
    dx = F.conv2d(dy, d_weight.flip(2, 3), padding=padding, groups=groups)
    return dx, F.conv2d(x, d_weight, padding=padding, groups=groups), None


weight_gradient.register_autograd(_backward, setup_context=_save_for_backward)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        taps = weight.shape[-1]
        # oneDNN's convolution with the taps in reverse is faster than its gradient.
        dx = F.conv2d(dy, weight.flip(2, 3), padding=taps // 2, groups=len(weight)) if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(x, dy, taps), dy.sum((0, 2, 3))


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A depthwise convolution that keeps H x W, (B, C, H, W) -> the same, with weights (C, 1, K, K)."""
    if bias is not None and _takes_long(x, weight):
        y: Tensor = _Convolution.apply(x, weight, bias)
        return y
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def _takes_long(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN will be asked for the gradient of the weights in float32."""
    return (
        ONEDNN_IS_FAST
        and x.is_cpu
        and x.dtype == torch.float32
        and weight.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # which can't save a function in Python
        and not is_transformed()
    )
