"""A block without gradients on CPUs, in two C++ kernels: what goes into its memory, and what comes after it.

`native/block.cpp` keeps the channels of a few tokens in cache from the depthwise convolution to the sum with the
residual. `convneur.models.convneur.block` has the same block in PyTorch.

Shape legend: B images of H x W positions, N = H W tokens, C channels, h hidden width, d bottleneck width.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.flop_counter import register_flop_formula

from convneur.models.convneur.branches import GlobalBranch, LocalBranch
from convneur.models.convneur.config import Fusion
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.mixers import MemoryMixer
from convneur.ops import native
from convneur.ops.depthwise import DepthwiseConv2d
from convneur.ops.linear import ChannelLinear
from convneur.ops.transformed import is_transformed


class Block(Protocol):
    """What is looked at of a block; `convneur.models.convneur.block` has it."""

    local_branch: LocalBranch
    global_branch: GlobalBranch | None
    project: nn.Module
    fusion: Fusion
    gamma: nn.Parameter
    drop_path: nn.Module


TAPS = 7  # of the depthwise convolution a side, as the source has it


def takes(block: Block, x: Tensor) -> bool:
    """Whether `forward` computes this block.

    It leaves to PyTorch what it would pass over: modules with hooks, such as those of ZeRO stage 3, or all of them
    where there are hooks for all modules of the process, and modules or weights that somebody has put in the place of
    ours.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype == torch.float32
        and x.shape[1] == len(block.gamma)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # which would keep this image's width
        and not torch.compiler.is_exporting()
        and not is_transformed()
        and not (_global_forward_hooks or _global_forward_pre_hooks)
        and (_is_plain(nn.Identity, block.drop_path) or _drops_nothing(block.drop_path))
        and _local_is_plain(block.local_branch, len(block.gamma))
        and _fusion_is_plain(block, len(block.gamma))
        and _has_library()
    )


def _drops_nothing(drop_path: nn.Module) -> bool:
    return _is_plain(DropPath, drop_path) and not drop_path.training


def _local_is_plain(local: LocalBranch, channels: int) -> bool:
    return (
        _is_plain(LocalBranch, local)
        and _is_plain(DepthwiseConv2d, local.dwconv, channels, 1, TAPS, TAPS)
        and _is_plain(nn.LayerNorm, local.norm, channels)
        and _is_plain(ChannelLinear, local.up, None, channels)
        and _is_plain(nn.GELU, local.act)
        and local.act.approximate == "none"
        and _is_plain(ChannelLinear, local.down, channels, local.up.out_features)
    )


def _fusion_is_plain(block: Block, channels: int) -> bool:
    branch = block.global_branch
    if branch is None:
        return True
    projects = _is_plain(ChannelLinear, block.project, channels, 2 * channels)
    return (
        _is_plain(GlobalBranch, branch)
        and _is_plain(ChannelLinear, branch.expand, channels, None)
        and (projects if block.fusion == "concat" else _is_plain(nn.Identity, block.project))
    )


def _is_plain(kind: type[nn.Module], module: nn.Module, *weight: int | None) -> bool:
    """Whether a module is of this kind, without additions, and has a weight, if it shall have one, of these sizes."""
    if type(module) is not kind or module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
        return False
    if not weight:
        return True
    parameters, sizes = (module.weight, module.bias), (weight, weight[:1])
    return all(
        type(parameter) is nn.Parameter
        and len(parameter.shape) == len(wanted)
        and all(size in (None, actual) for size, actual in zip(wanted, parameter.shape, strict=True))
        for parameter, wanted in zip(parameters, sizes, strict=True)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_library() -> bool:
    return native.library() is not None


def forward(block: Block, x: Tensor) -> Tensor:
    """What the block makes of x, (B, C, H, W) -> (B, C, H, W)."""
    local, branch, (images, channels, height, width) = block.local_branch, block.global_branch, x.shape
    # Tokens in a row: torch.compile takes any map, (B, H, W, C) too, for one with the channels first, and copies it.
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    context, expand, project = None, [], []
    if branch is not None:
        context, expand = _context(branch, tokens, height, width), _weights(branch.expand)
        project = _weights(block.project) if block.fusion == "concat" else []
    result: Tensor = _block_output(
        tokens,
        width,
        [weight for layer in (local.dwconv, local.norm, local.up, local.down) for weight in _weights(layer)],
        block.gamma,
        local.norm.eps,
        context,
        [*expand, *project],
        block.fusion == "gate",
    )
    return result.view(images, height, width, channels).permute(0, 3, 1, 2)


def _weights(module: Any) -> list[Tensor]:
    return [module.weight, module.bias]


def _context(branch: GlobalBranch, tokens: Tensor, height: int, width: int) -> Tensor:
    """The global branch before its last layer, (B, N, C) -> (B, N, d)."""
    reduce, norm, mixer = branch.reduce, branch.norm, branch.mixer
    d, channels = branch.expand.in_features, tokens.shape[-1]
    if not (_is_plain(ChannelLinear, reduce, d, channels) and _is_plain(nn.LayerNorm, norm, d)):
        return mixer(norm(reduce(tokens.unflatten(1, (height, width))))).flatten(1, 2)
    layers = [*_weights(reduce), *_weights(norm)]
    memory = mixer.memory if isinstance(mixer, MemoryMixer) and _is_plain(MemoryMixer, mixer) else None
    if memory is not None and _is_plain(NeuralMemory, memory) and memory.dim == d:
        layers += memory.projection(tokens.shape[1])
        if len(layers[-1]) == memory.dim:  # queries alone: nothing is written before all are read
            return _bottleneck(tokens, [*layers, memory.w1, memory.w2], norm.eps)
        return memory.recurrence(_bottleneck(tokens, layers, norm.eps))
    return mixer(_bottleneck(tokens, layers, norm.eps).unflatten(1, (height, width))).flatten(1, 2)


@torch.library.custom_op("convneur::bottleneck", mutates_args=())
def _bottleneck(x: Tensor, layers: Sequence[Tensor], eps: float) -> Tensor:
    """norm(reduce(x)) of (B, N, C), then another layer where there are weights of three, and then what its outputs,
    as queries, read from a memory where its W1 (d, h) and W2 (h, d) follow.
    """
    out = x.new_empty(_bottleneck_shape(x, layers))
    hidden = layers[6].shape[1] if len(layers) == 8 else 0
    sizes = x.shape[:-1].numel(), x.shape[-1], len(layers[0]), out.shape[-1], hidden
    _call("bottleneck", sizes, eps, [x, *layers, *[None] * (8 - len(layers)), out])
    return out


def _bottleneck_shape(x: Tensor, layers: Sequence[Tensor]) -> list[int]:
    return [*x.shape[:-1], len(layers[5 if len(layers) > 4 else 0])]


@torch.library.custom_op("convneur::block_output", mutates_args=())
def _block_output(
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

    `layers` are dwconv, norm, up and down; `fusion` the one that expands the context and, for concat, the one behind.
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


@_bottleneck.register_fake
def _(x: Tensor, layers: Sequence[Tensor], eps: float) -> Tensor:
    return x.new_empty(_bottleneck_shape(x, layers))


@_block_output.register_fake
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
