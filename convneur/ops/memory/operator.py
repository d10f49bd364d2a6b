"""The neural memory's recurrence as one PyTorch operator, `convneur::neural_memory`, with its own backward pass.

Compilers and exporters take an operator as it is: no graph breaks, no loop unrolled over chunks, any number of tokens.
What computes it is `convneur.ops.memory.triton` on CUDA and `convneur.ops.memory.cpp` on CPUs, where they fit, and
`convneur.ops.memory.eager` elsewhere.

Shape legend: B images, N tokens, L tokens a chunk, d memory width, h hidden width.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convneur.ops.memory import cpp, eager, equations
from convneur.ops.memory.equations import MemoryState, update_factors
from convneur.ops.memory.passes import Given, Implementation, Kept, Settings, kept_shapes
from convneur.ops.memory.reading import ReadOrder, updates, written_tokens
from convneur.ops.precision import own_precision


def recurrence(
    qkv: Tensor,
    w1: Tensor,
    w2: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
    kernels: bool = True,
) -> Tensor:
    """Context (B, N, d), the same as the equations' `recurrence` computes; the arguments are the operator's."""
    tensors = qkv, w1, w2, generator_weight, generator_bias
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and not torch.compiler.is_exporting()
    keep = keep or torch.jit.is_tracing()  # whoever runs the trace may want gradients, wherever it was made
    with own_precision(qkv):
        context: Tensor = neural_memory(*tensors, chunk_length, inner_lr, read, keep, kernels)[0]
    return context


def _state_dtype(qkv: Tensor) -> torch.dtype:
    """Precision of the state and of all arithmetic on it: that of the tokens, but float32 at least."""
    return torch.promote_types(qkv.dtype, torch.float32)


def _implementation(qkv: Tensor, d: int, count: int, kernels: bool) -> Implementation:
    """What is to compute it."""
    if kernels and count and len(qkv):
        if qkv.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
            from convneur.ops.memory import triton  # takes seconds to import

            if triton.fits(qkv, d):
                return triton
        elif cpp.fits(qkv, d):
            return cpp
    return eager


def _given(qkv: Tensor, w1: Tensor, w2: Tensor, generator_weight: Tensor, generator_bias: Tensor) -> Given:
    """The operator's tensors in the precision of the state."""
    dtype = _state_dtype(qkv)
    start = torch.stack((w1, w2.T)).to(dtype)
    return Given(qkv, start, generator_weight.to(dtype), generator_bias.to(dtype))


@torch.library.custom_op("convneur::neural_memory", mutates_args=())
def neural_memory(
    qkv: Tensor,
    w1: Tensor,
    w2: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: str,
    keep: bool,
    kernels: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reads and writes the memory chunk by chunk.

    Args:
        qkv: queries, keys and values (B, N, 3d).
        w1: (d, h).
        w2: (h, d).
        generator_weight: of the update generator, (3d, d).
        generator_bias: (3d,).
        chunk_length: L.
        inner_lr: scale of the inner step size.
        read: a ReadOrder.
        keep: whether to return more than the context.
        kernels: whether kernels of our own, in Triton or C++, may be used.

    Returns:
        The context (B, N, d), in the precision of qkv; then the fields of `Kept`, all empty if not kept.
    """
    settings = Settings(chunk_length, inner_lr, cast(ReadOrder, read))
    given = _given(qkv, w1, w2, generator_weight, generator_bias)
    count = updates(settings.read, qkv.shape[1], chunk_length)
    y, kept = _implementation(qkv, w1.shape[0], count, kernels).forward(given, settings, keep)
    states, surprises, factors, errors, scales = kept if keep else (given.start.new_empty(0) for _ in kept)
    return y, states, surprises, factors, errors, scales


@torch.library.custom_op("convneur::neural_memory_backward", mutates_args=())
def neural_memory_backward(
    dy: Tensor,
    qkv: Tensor,
    w1: Tensor,
    w2: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    states: Tensor,
    surprises: Tensor,
    factors: Tensor,
    errors: Tensor,
    scales: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: str,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, w1, w2 and the update generator's weight and bias, from what `neural_memory` kept.

    The bias is not read, but the gradients depend on it, and so do theirs.
    """
    given = _given(qkv, w1, w2, generator_weight, generator_bias)
    kept = Kept(states, surprises, factors, errors, scales)
    settings = Settings(chunk_length, inner_lr, cast(ReadOrder, read))
    implementation = _implementation(qkv, w1.shape[0], len(states), kernels)
    d_qkv, d_start, d_logits = implementation.backward(dy.contiguous(), given, kept, settings)
    d_logits, surprises = d_logits.flatten(0, 1), surprises.flatten(0, 1)
    d_w2 = d_start[1].T.clone(memory_format=torch.contiguous_format)  # a memory of width 1 is contiguous as it is
    return d_qkv, d_start[0], d_w2, d_logits.T @ surprises, d_logits.sum(0)


@neural_memory.register_fake
def _(
    qkv: Tensor,
    w1: Tensor,
    w2: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: str,
    keep: bool,
    kernels: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (images, tokens, _), (d, h) = qkv.shape, w1.shape
    shapes = kept_shapes(images, tokens, d, h, Settings(chunk_length, inner_lr, cast(ReadOrder, read)))
    states, surprises, factors, errors, scales = (
        qkv.new_empty(shape if keep else (0,), dtype=_state_dtype(qkv)) for shape in shapes
    )
    return qkv.new_empty(images, tokens, d), states, surprises, factors, errors, scales


@neural_memory_backward.register_fake
def _(
    dy: Tensor,
    qkv: Tensor,
    w1: Tensor,
    w2: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    states: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = w1, w2, generator_weight, generator_bias
    d_w1, d_w2, d_weight, d_bias = (states.new_empty(weight.shape) for weight in weights)
    return torch.empty_like(qkv), d_w1, d_w2, d_weight, d_bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, chunk_length, inner_lr, read, _, kernels = inputs
    ctx.settings = chunk_length, inner_lr, read, kernels
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    with torch.autocast(dy.device.type, enabled=False):
        return *neural_memory_backward(dy, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


neural_memory.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[11:14]
    ctx.save_for_backward(*inputs[:6])


def _second_backward(ctx: Any, *adjoints: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, which are asked for rarely: of the equations, by PyTorch's operations."""
    chunk_length, inner_lr, read = ctx.settings
    with torch.enable_grad(), own_precision(ctx.saved_tensors[0]):
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors]
        dy, qkv, w1, w2, weight, bias = inputs
        generator = partial(update_factors, weight=weight, bias=bias, inner_lr=inner_lr)
        context = equations.recurrence(qkv, MemoryState(w1, w2), generator, chunk_length, read)
        gradients = torch.autograd.grad(context, inputs[1:], dy, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(
        gradients, inputs, adjoints, create_graph=torch.is_grad_enabled(), materialize_grads=True
    )
    return *second, *[None] * 9


neural_memory_backward.register_autograd(_second_backward, setup_context=_save_for_second_backward)


@register_flop_formula(torch.ops.convneur.neural_memory)
def _(
    qkv: Any,
    w1: Any,
    w2: Any,
    weight: Any,
    bias: Any,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * macs(qkv[:2], w1, chunk_length, read)


def macs(tokens_of: Sequence[int], w1: Sequence[int], chunk_length: int, read: ReadOrder) -> int:
    """Multiply-accumulates of (images, tokens) in a memory whose W1 is (d, h): 8 d^2 a token read, 20 a token written.

    Matrix products only, as every counter takes them.
    """
    (images, tokens), (d, h) = tokens_of, w1
    count, written = updates(read, tokens, chunk_length), written_tokens(read, tokens, chunk_length)
    return images * (2 * tokens * d * h + 5 * written * d * h + count * 3 * d * d)


@register_flop_formula(torch.ops.convneur.neural_memory_backward)
def _(
    dy: Any,
    qkv: Any,
    w1: Any,
    w2: Any,
    weight: Any,
    bias: Any,
    states: Any,
    surprises: Any,
    factors: Any,
    errors: Any,
    scales: Any,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
    *_: Any,
    **__: Any,
) -> int:
    """20 d^2 multiply-accumulates a token that was read, 48 a token that was written, what is recomputed included."""
    (images, tokens, _), (d, h) = qkv, w1
    count, written = updates(read, tokens, chunk_length), written_tokens(read, tokens, chunk_length)
    total: int = images * (5 * tokens * d * h + 12 * written * d * h + count * 6 * d * d)
    return 2 * total
