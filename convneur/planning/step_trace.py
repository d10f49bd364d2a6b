"""A training step without data or arithmetic: which tensors live when, and what every operator computes and moves.

The real model runs forward and backward on fake tensors, which have shapes and no memory. What it would allocate is
counted storage by storage, so the count holds for every variant, placement, branch, reading order and image size, with
recomputation and without, and there is no formula to keep in step with the model.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from convneur.models.backbone import Backbone
from convneur.models.build import build_model
from convneur.models.convneur.config import ModelConfig

Precision = Literal["fp32", "autocast", "bf16", "fp16"]
Group = Literal["matrix", "depthwise", "memory", "pointwise"]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = {"fp32": torch.float32, "autocast": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}

# What an autocast region on CUDA computes in half precision and in float32, as far as the model uses it: pytorch.org,
# "CUDA Ops that can autocast". On a CPU the lists are others, and torch applies them itself.
HALF_ON_CUDA = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__}
FLOAT_ON_CUDA = {F.layer_norm, F.softmax, F.normalize, torch.softmax, Tensor.softmax, Tensor.sum, torch.sum, Tensor.pow}


@dataclass(frozen=True)
class Moment:
    """The stretch of a step that ends when a parameter's gradient is complete, or with the forward or backward pass.

    Attributes:
        high: the most bytes that activations and everything else passing hold in it, gradients of parameters left out.
        grown: elements of the parameter whose gradient is complete at its end; 0 for none.
        name: that parameter's; "" for none.
    """

    high: int
    grown: int
    name: str


@dataclass(frozen=True)
class Kernel:
    """An operator that computes something.

    Attributes:
        name: such as aten.mm.
        flops: two a multiply-accumulate, of matrix products, convolutions and the memory.
        bytes: read and written, each tensor once.
        half: whether it computes in half precision.
        group: what bounds it: "matrix" products, "depthwise" convolutions, "memory" for the neural memory's recurrence,
            or "pointwise" for norms and all else.
        forward: whether it belongs to the forward pass.
    """

    name: str
    flops: float
    bytes: int
    half: bool
    group: Group
    forward: bool


@dataclass(frozen=True)
class Trace:
    """A micro-batch's forward and backward pass.

    Attributes:
        moments: in order of time.
        kernels: in order of time.
        shapes: of every parameter, by its name.
        memory_states: bytes of what the memory branches keep for the backward pass: fast weights, velocities, errors.
    """

    moments: tuple[Moment, ...]
    kernels: tuple[Kernel, ...]
    shapes: dict[str, torch.Size]
    memory_states: int


def trace_step(
    config: ModelConfig,
    images: int,
    image_size: int,
    precision: Precision,
    *,
    recompute: bool = False,
    cuda: bool = True,
) -> Trace:
    """Follows one micro-batch of square images through a training step.

    Args:
        config: of the model.
        images: of the micro-batch.
        image_size: pixels a side.
        precision: "autocast" is bfloat16 where autocast allows it; "bf16" and "fp16" are DeepSpeed's modes, in which
            the weights themselves are half precision.
        recompute: whether blocks compute their activations again in the backward pass.
        cuda: what a GPU would do; else a CPU.
    """
    with FakeTensorMode():
        model = _model(config, DTYPES[precision] if precision in ("bf16", "fp16") else torch.float32)
        model.set_grad_checkpointing(recompute)
        with _Watch(model) as watch:
            x = torch.empty(images, config.in_chans, image_size, image_size).to(memory_format=torch.channels_last)
            target = torch.empty(images, config.num_classes)
            with _autocast(precision, cuda):
                logits = model(x.to(next(model.parameters()).dtype))
            loss = SoftTargetCrossEntropy()(logits.float(), target)
            watch.turn()
            # What is recomputed needs autocast anew. torch restores its own; this one has to be there, and steps aside
            # for every public way into the backward pass.
            with _autocast(precision, cuda) if cuda else nullcontext():
                ones = torch.ones_like(loss)
                torch.autograd.Variable._execution_engine.run_backward(
                    (loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            watch.turn()
    return Trace(tuple(watch.moments), tuple(watch.kernels), watch.shapes, watch.memory_states)


def _model(config: ModelConfig, dtype: torch.dtype) -> Backbone:
    """A model that is made in its precision, as fake parameters can't be converted to another."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_model(config)
    finally:
        torch.set_default_dtype(usual)


def _autocast(precision: Precision, cuda: bool) -> AbstractContextManager[Any]:
    if precision != "autocast":
        return nullcontext()
    return _CudaAutocast() if cuda else torch.autocast("cpu", torch.bfloat16)


class _CudaAutocast(TorchFunctionMode):
    """Autocast by CUDA's lists, for fake tensors on a machine without CUDA, where torch's own can't be entered."""

    def __init__(self) -> None:
        super().__init__()
        self.cached: dict[int, Tensor] = {}

    def _half(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not x.is_leaf or not x.requires_grad:
            return x.to(torch.bfloat16)
        if id(x) not in self.cached:
            self.cached[id(x)] = x.to(torch.bfloat16)
        return self.cached[id(x)]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HALF_ON_CUDA:
            args, kwargs = [self._half(x) for x in args], {name: self._half(x) for name, x in kwargs.items()}
        elif func in FLOAT_ON_CUDA:
            args = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        return func(*args, **kwargs)


# Their outputs hold nothing that was computed, or nothing new.
IDLE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
CONVOLUTIONS = {"convolution": 8, "convolution_backward": 9}  # which argument says in how many groups
MEMORY = (torch.ops.convneur.neural_memory.default, torch.ops.convneur.neural_memory_backward.default)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made, and that are still alive.

    What an operator allocates for itself while it runs, such as the scratch of a convolution, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.high = 0  # the most that `live` has been since it was last set back
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.see(out)
        return out

    def see(self, tree: Any) -> None:
        """Counts the storages of all tensors in a tree, if they haven't been counted."""
        for tensor in _tensors(tree):
            storage = tensor.untyped_storage()
            if tensor.device.type != "meta" and storage not in self._seen:
                self._seen[storage] = None
                size = storage.nbytes()
                self.live += size
                self.high = max(self.high, self.live)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


class _Watch(LiveStorages):
    """Also sees what every operator does, and when the gradient of a parameter is complete."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self.kernels: list[Kernel] = []
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.memory_states = 0
        self._forward = True
        self.see(list(model.parameters()))
        self.live = self.high = 0
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(self._grown, name))

    def turn(self) -> None:
        """The forward or the backward pass is over."""
        self.moments.append(Moment(self.high, 0, ""))
        self.high, self._forward = self.live, False

    def _grown(self, name: str, parameter: Tensor) -> None:
        parameter.grad = None  # whoever plans decides what becomes of it
        self.moments.append(Moment(self.high, parameter.numel(), name))
        self.high = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        if func is torch.ops.convneur.neural_memory.default:
            self.memory_states += sum(x.nbytes for x in out[1:])
        self.see(out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        if func.namespace == "prim" or func.is_view or name in IDLE:
            return
        formula = flop_registry.get(func.overloadpacket)
        group: Group = "matrix" if formula else "pointwise"
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        if func in MEMORY:
            group = "memory"
        elif name in CONVOLUTIONS and args[CONVOLUTIONS[name]] > 1:
            group = "depthwise"
            if name == "convolution_backward":  # torch's formula leaves the groups out of account
                grad, weight, wanted = args[0], args[2], args[-1]
                flops = 2 * grad.numel() * weight[0].numel() * sum(wanted[:2])
        moved = [*_tensors((args, kwargs)), *_tensors(out)]
        half = any(x.dtype in HALVES for x in _tensors(out))
        self.kernels.append(Kernel(str(func), flops, sum(x.nbytes for x in moved), half, group, self._forward))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
