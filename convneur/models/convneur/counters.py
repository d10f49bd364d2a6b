"""For counters of operations that don't ask PyTorch's dispatcher, but know modules or traced graphs: what to tell them.

PyTorch's own FlopCounterMode needs nothing of this. thop and ptflops count modules by their exact class, and fvcore the
operations of a trace; each has a way to be taught others:

    thop.profile(model, inputs=(images,), custom_ops=counters.THOP)
    ptflops.get_model_complexity_info(model, (3, 224, 224), custom_modules_hooks=counters.PTFLOPS)
    fvcore.nn.FlopCountAnalysis(model, images).set_op_handle(**counters.FVCORE)

All of them count a multiply-accumulate as one.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from convneur.models.convneur.memory import NeuralMemory
from convneur.models.layers import ChannelLinear, DepthwiseConv2d
from convneur.ops.memory.operator import macs


def module_macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Multiply-accumulates of a layer or a memory of ours that has made y of x."""
    if isinstance(module, ChannelLinear):
        return y.numel() * module.in_features
    if isinstance(module, DepthwiseConv2d):
        return y.numel() * module.weight[0].numel()
    if isinstance(module, NeuralMemory):
        tokens, settings = math.prod(x.shape[1:-1]), module.settings
        projection = module.projection(tokens)[0].numel() * tokens * len(x)
        return projection + macs((len(x), tokens), module.w1.shape, settings[0], settings[2])
    raise TypeError(f"{type(module).__name__} is none of convneur's own")


def _thop(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    module.total_ops += module_macs(module, inputs[0], output)


def _ptflops(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    module.__flops__ += module_macs(module, inputs[0], output)


def _fvcore(inputs: list[Any], outputs: list[Any]) -> int:
    """Of the operator in a trace; its inputs are values of the graph."""
    qkv, w1 = (value.type().sizes() for value in inputs[:2])
    chunk_length, read = inputs[5].toIValue(), inputs[7].toIValue()
    return macs(qkv[:2], w1, chunk_length, read)


_OWN = (ChannelLinear, DepthwiseConv2d, NeuralMemory)
THOP: dict[type[nn.Module], Callable[..., None]] = dict.fromkeys(_OWN, _thop)
PTFLOPS: dict[type[nn.Module], Callable[..., None]] = dict.fromkeys(_OWN, _ptflops)
FVCORE: dict[str, Callable[..., int]] = {"convneur::neural_memory": _fvcore}
