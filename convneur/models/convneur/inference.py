"""Which blocks the C++ operators compute, and how: those without gradients on a CPU, as long as nobody changed them.

`convneur.ops.block` has the operators, `convneur.models.convneur.block` the same block in PyTorch.

Shape legend: B images of H x W positions, N = H W tokens, C channels, d bottleneck width.
"""

from typing import Any, Protocol

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from convneur.models.convneur.branches import GlobalBranch, LocalBranch
from convneur.models.convneur.config import Fusion
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.mixers import MemoryMixer
from convneur.models.layers import ChannelLinear, DepthwiseConv2d
from convneur.ops.block import TAPS, block_output, bottleneck, has_kernels
from convneur.ops.transformed import is_transformed


class Block(Protocol):
    """What is looked at of a block; the class itself is built on this file."""

    local_branch: LocalBranch
    global_branch: GlobalBranch | None
    project: nn.Module
    fusion: Fusion
    gamma: nn.Parameter
    drop_path: nn.Module


def takes(block: Block, x: Tensor) -> bool:
    """Whether `run_block` computes this block.

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
        and _is_ours(block, len(block.gamma))
        and has_kernels()
    )


def _is_ours(block: Block, channels: int) -> bool:
    """Whether all that the operators pass over is what `Block` has made."""
    local, branch, drop_path = block.local_branch, block.global_branch, block.drop_path
    expands = branch is None or (
        _is_plain(GlobalBranch, branch) and _is_plain(ChannelLinear, branch.expand, channels, None)
    )
    concatenates = branch is not None and block.fusion == "concat"
    return (
        expands
        and (
            _is_plain(ChannelLinear, block.project, channels, 2 * channels)
            if concatenates
            else _is_plain(nn.Identity, block.project)
        )
        and (_is_plain(nn.Identity, drop_path) or (_is_plain(DropPath, drop_path) and not drop_path.training))
        and _is_plain(LocalBranch, local)
        and _is_plain(DepthwiseConv2d, local.dwconv, channels, 1, TAPS, TAPS)
        and _is_plain(nn.LayerNorm, local.norm, channels)
        and _is_plain(ChannelLinear, local.up, None, channels)
        and _is_plain(nn.GELU, local.act)
        and local.act.approximate == "none"
        and _is_plain(ChannelLinear, local.down, channels, local.up.out_features)
    )


def _is_plain(kind: type[nn.Module], module: nn.Module, *weight: int | None) -> bool:
    """Whether a module is of this kind, without additions, and has a weight, if it shall have one, of these sizes."""
    if type(module) is not kind or module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
        return False
    return not weight or (_has_sizes(module.weight, weight) and _has_sizes(module.bias, weight[:1]))


def _has_sizes(parameter: object, sizes: tuple[int | None, ...]) -> bool:
    """Whether it is a parameter like those that modules make, of these sizes; None is any."""
    return (
        type(parameter) is nn.Parameter
        and len(parameter.shape) == len(sizes)
        and all(size in (None, actual) for size, actual in zip(sizes, parameter.shape, strict=True))
    )


def run_block(block: Block, x: Tensor) -> Tensor:
    """What the block makes of x, (B, C, H, W) -> (B, C, H, W)."""
    local, branch, (images, channels, height, width) = block.local_branch, block.global_branch, x.shape
    # Tokens in a row: torch.compile takes any map, (B, H, W, C) too, for one with the channels first, and copies it.
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    context, expand, project = None, [], []
    if branch is not None:
        context, expand = _context(branch, tokens, height, width), _weights(branch.expand)
        project = _weights(block.project) if block.fusion == "concat" else []
    result: Tensor = block_output(
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
            return bottleneck(tokens, [*layers, memory.w1, memory.w2], norm.eps)
        return memory.recurrence(bottleneck(tokens, layers, norm.eps))
    return mixer(bottleneck(tokens, layers, norm.eps).unflatten(1, (height, width))).flatten(1, 2)
