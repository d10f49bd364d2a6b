"""The local branch's MLP over channels, GELU between two linear layers, in one go where no gradients are wanted.

Shape legend: B images, H x W positions, C channels, h hidden width.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from convneur import native
from convneur.linear import ChannelLinear

# Both weights of a wider one leave a core's cache, and oneDNN's products catch up (AMD EPYC, family 26).
LARGEST_DIM = 128


class GELU(nn.GELU):
    """In place where nothing is kept for a backward pass: a new tensor of this size takes longer than the function."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        if torch.is_grad_enabled() or torch.jit.is_scripting():
            return F.gelu(input)
        return torch.ops.aten.gelu_(input)


def channel_mlp(x: Tensor, up: nn.Module, act: nn.Module, down: nn.Module) -> Tensor:
    """down(act(up(x))), (B, H, W, C) -> (B, H, W, C).

    On a CPU, without gradients, it comes from `native/mlp.cpp`, which keeps the hidden channels of a hundred positions
    in cache: in memory they are four times as large as what goes in. Modules that are of another kind, or have hooks,
    as ZeRO stage 3 gives them, are called.
    """
    if _has_kernel(x, up, act, down):
        result: Tensor = _channel_mlp(x, up.weight, up.bias, down.weight, down.bias)
        return result
    return down(act(up(x)))


register_notrace_function(channel_mlp)


def _has_kernel(x: Tensor, *modules: nn.Module) -> bool:
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.shape[-1] <= LARGEST_DIM
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not torch.onnx.is_in_onnx_export()
        and [type(module) for module in modules] == [ChannelLinear, GELU, ChannelLinear]
        and not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    )


@torch.library.custom_op("convneur::channel_mlp", mutates_args=())
def _channel_mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    library = native.library()
    if library is None:
        return F.linear(torch.ops.aten.gelu_(F.linear(x, up, up_bias)), down, down_bias)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors = [tensor.contiguous() for tensor in (x, up, up_bias, down, down_bias)]
    rows, (hidden, channels) = x.shape[:-1].numel(), up.shape
    sizes = [ctypes.c_int64(size) for size in (rows, channels, hidden)]
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, out)]
    if library.channel_mlp_float(*sizes, *addresses, torch.get_num_threads()):
        raise MemoryError(f"no memory left for an MLP of {channels} channels")
    return out


@_channel_mlp.register_fake
def _(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.convneur.channel_mlp)
def _(x: Any, up: Any, *_: Any, **__: Any) -> int:
    *rows, _channels = x
    return 4 * torch.Size(rows).numel() * up[0] * up[1]
