"""The neural memory's recurrence on CPUs in C++, by `native/memory.cpp`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from convneur.ops import native
from convneur.ops.memory.reading import ReadOrder, steps, updates, written_tokens

# A wider memory's state leaves the cache. On an AMD EPYC MKL's products catch up between 384 and 512.
LARGEST_DIM = 256
_NAMES = {torch.float32: "float", torch.float64: "double"}
_C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def fits(qkv: Tensor, d: int) -> bool:
    """Whether the kernel takes these tokens, (B, N, 3d), and can be had."""
    return qkv.is_cpu and d <= LARGEST_DIM and native.library() is not None


def _run(direction: str, like: Tensor, chunk_length: int, read: ReadOrder, inner_lr: float, **tensors: Tensor) -> None:
    """Calls the kernel for the tensors by their names in the source; those left out are null."""
    (images, tokens, _), (_, d, h) = tensors["qkv"].shape, tensors["start"].shape
    keys, queries = zip(*(step.sizes for step in steps(read, tokens, chunk_length)), strict=True)
    counts = ctypes.c_int64 * len(keys)
    problem = _problem(like.dtype)(
        images=images,
        tokens=tokens,
        written=written_tokens(read, tokens, chunk_length),
        steps=len(keys),
        updates=updates(read, tokens, chunk_length),
        d=d,
        h=h,
        keys=counts(*keys),
        queries=counts(*queries),
        inner_lr=inner_lr,
    )
    for name, tensor in tensors.items():
        assert (tensor.is_contiguous(), tensor.dtype) == (True, like.dtype), name
        setattr(problem, name, tensor.data_ptr())
    function = getattr(native.library(), f"{direction}_{_NAMES[like.dtype]}")
    if function(ctypes.byref(problem), torch.get_num_threads()):
        raise MemoryError(f"no memory left for the neural memory of {images} images")


@cache
def _problem(dtype: torch.dtype) -> type[ctypes.Structure]:
    """`Problem` of the source."""
    counts = ("images", "tokens", "written", "steps", "updates", "d", "h")
    read = ("qkv", "start", "generator_weight", "generator_bias")
    kept = ("states", "surprises", "factors", "errors", "scales")
    rest = ("context", "d_context", "d_qkv", "d_starts", "d_logits")
    sizes = ctypes.POINTER(ctypes.c_int64)

    class Problem(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_int64) for name in counts),
            ("keys", sizes),
            ("queries", sizes),
            ("inner_lr", _C_TYPES[dtype]),
            *((name, ctypes.c_void_p) for name in (*read, *kept, *rest)),
        ]

    return Problem


def forward(
    qkv: Tensor,
    start: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `eager.forward` returns; all but the context are empty where they aren't kept. The scales of keys
    that are never written are zero.
    """
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    count = updates(read, tokens, chunk_length)
    context = start.new_empty(images, tokens, d)
    shapes = {
        "states": (count, 2, 2, images, d, h),
        "surprises": (count, images, d),
        "factors": (count, images, 3 * d),
        "errors": (images, written_tokens(read, tokens, chunk_length), d),
        "scales": (images, tokens, 2, 1),
    }
    kept = {name: start.new_empty(shape if keep else 0) for name, shape in shapes.items()}
    _run(
        "forward",
        start,
        chunk_length,
        read,
        inner_lr,
        qkv=qkv.to(start.dtype).contiguous(),
        start=start,
        generator_weight=generator_weight.contiguous(),
        generator_bias=generator_bias,
        context=context,
        **(kept if keep else {}),
    )
    states, surprises, factors, errors, scales = kept.values()
    return context.to(qkv.dtype), states, surprises, factors, errors, scales


def backward(
    dy: Tensor,
    qkv: Tensor,
    scales: Tensor,
    start: Tensor,
    generator_weight: Tensor,
    states: Tensor,
    factors: Tensor,
    errors: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, of M_0 as (2, d, h) and of the update generator's logits, (U, B, 3d)."""
    d_qkv = torch.empty_like(qkv, dtype=scales.dtype, memory_format=torch.contiguous_format)
    d_starts = scales.new_empty(2, len(qkv), *start.shape[1:])
    d_logits = torch.empty_like(factors)
    _run(
        "backward",
        scales,
        chunk_length,
        read,
        inner_lr,
        qkv=qkv.to(scales.dtype).contiguous(),
        scales=scales,
        start=start,
        generator_weight=generator_weight.contiguous(),
        states=states,
        factors=factors,
        errors=errors,
        d_context=dy.to(scales.dtype).contiguous(),
        d_qkv=d_qkv,
        d_starts=d_starts,
        d_logits=d_logits,
    )
    return d_qkv.to(qkv.dtype), d_starts.sum(1), d_logits
