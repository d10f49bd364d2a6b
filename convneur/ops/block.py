"""A block without gradients on CPUs, as two operators in C++: what goes into its memory, and what comes after it.

`native/block.cpp` keeps the channels of a few tokens in cache from the depthwise convolution to the sum with the
residual.

Shape legend: B images of H x W positions, N = H W tokens, C channels, h hidden width, d bottleneck width.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convneur.ops import native

TAPS = 7  # of the depthwise convolution a side, as the source has it


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernels() -> bool:
    """Whether the compiled source can be had."""
    return native.library() is not None


@torch.library.custom_op("convneur::bottleneck", mutates_args=())
def bottleneck(x: Tensor, layers: Sequence[Tensor], eps: float) -> Tensor:
    """norm(reduce(x)) of (B, N, C), then another layer where there are weights of three, and then what its outputs,
    as queries, read from a memory where its W1 (d, h) and W2 (h, d) follow.

    Args:
        x: (B, N, C).
        layers: weight and bias of each layer, then W1 and W2.
        eps: the norm's.
    """
    out = x.new_empty(_bottleneck_shape(x, layers))
    hidden = layers[6].shape[1] if len(layers) == 8 else 0
    sizes = x.shape[:-1].numel(), x.shape[-1], len(layers[0]), out.shape[-1], hidden
    _call("bottleneck", sizes, eps, [x, *layers, *[None] * (8 - len(layers)), out])
    return out


def _bottleneck_shape(x: Tensor, layers: Sequence[Tensor]) -> list[int]:
    return [*x.shape[:-1], len(layers[5 if len(layers) > 4 else 0])]


@torch.library.custom_op("convneur::block_output", mutates_args=())
def block_output(
    x: Tensor,
    width: int,
    layers: Sequence[Tensor],
    gamma: Tensor,
    eps: float,
    context: Tensor | None,
    fusion: Sequence[Tensor],
    gate: bool,
) -> Tensor:
    """x + gamma y of x (B, N, C), y = down(GELU(up(norm(dwconv(x))))) and, if there is one, a context (B, N, d).

    Args:
        x: (B, N, C), N = H width.
        width: W of the map.
        layers: weight and bias of dwconv, norm, up and down.
        gamma: (C,).
        eps: the norm's.
        context: what the global branch has before its last layer.
        fusion: weight and bias of the layer that expands the context and, for concat, of the one behind.
        gate: whether the sigmoid of the expanded context multiplies y; else it is added, or put beside y.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    images, tokens, channels = x.shape
    sizes = images, tokens // width, width, channels, len(layers[4]), context.shape[-1] if context is not None else 0
    none = [None] * (4 - len(fusion))
    _call("block_output", (*sizes, gate), eps, [x, *layers, gamma, context, *fusion, *none, out])
    return out


def _call(function: str, sizes: Sequence[int], eps: float, tensors: Sequence[Tensor | None]) -> None:
    """Calls the source's function; None is a null pointer."""
    given = [tensor.contiguous() if tensor is not None else None for tensor in tensors]
    for tensor in given:
        if tensor is not None and (tensor.dtype, tensor.device.type) != (torch.float32, "cpu"):
            raise TypeError(f"expected float32 on the CPU like the input, got {tensor.dtype} on {tensor.device}")
    addresses = [ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None) for tensor in given]
    counts = [ctypes.c_int64(size) for size in sizes]
    if getattr(native.library(), function)(*counts, ctypes.c_float(eps), *addresses, torch.get_num_threads()):
        raise MemoryError(f"no memory left for {function}, with sizes {', '.join(map(str, sizes))}")


@bottleneck.register_fake
def _(x: Tensor, layers: Sequence[Tensor], eps: float) -> Tensor:
    return x.new_empty(_bottleneck_shape(x, layers))


@block_output.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flops(positions: Any, weights: Sequence[Any]) -> int:
    return 2 * torch.Size(positions).numel() * sum(torch.Size(weight).numel() for weight in weights if len(weight) > 1)


@register_flop_formula(torch.ops.convneur.bottleneck)
def _(x: Any, layers: Any, *_: Any, **__: Any) -> int:
    return _flops(x[:-1], layers)


@register_flop_formula(torch.ops.convneur.block_output)
def _(x: Any, width: Any, layers: Any, gamma: Any, eps: Any, context: Any, fusion: Any, *_: Any, **__: Any) -> int:
    return _flops(x[:-1], [*layers, *fusion])
