"""The neural memory's recurrence on CPUs in C++, by `native/memory.cpp`."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from convneur.ops import native
from convneur.ops.memory.passes import Given, Gradients, Kept, Settings, kept_shapes
from convneur.ops.memory.reading import steps, updates, written_tokens

# A wider memory's state leaves the cache. On an AMD EPYC MKL's products catch up between 384 and 512.
LARGEST_DIM = 256
_NAMES = {torch.float32: "float", torch.float64: "double"}
_C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def fits(qkv: Tensor, d: int) -> bool:
    """Whether the kernel takes these tokens, (B, N, 3d), and can be had."""
    return qkv.is_cpu and d <= LARGEST_DIM and native.library() is not None


def _run(direction: str, settings: Settings, **tensors: Tensor) -> None:
    """Calls the kernel for the tensors by their names in the source; those left out are null."""
    chunk_length, inner_lr, read = settings
    (images, tokens, _), (_, d, h), dtype = tensors["qkv"].shape, tensors["start"].shape, tensors["start"].dtype
    keys, queries = zip(*(step.sizes for step in steps(read, tokens, chunk_length)), strict=True)
    counts = ctypes.c_int64 * len(keys)
    problem = _problem(dtype)(
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
        assert (tensor.is_contiguous(), tensor.dtype) == (True, dtype), name
        setattr(problem, name, tensor.data_ptr())
    function = getattr(native.library(), f"{direction}_{_NAMES[dtype]}")
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


def forward(given: Given, settings: Settings, keep: bool) -> tuple[Tensor, Kept]:
    """The context, and what is kept; all of that is empty without `keep`. The scales of keys that are never written are
    zero.
    """
    start = given.start
    (images, tokens, _), (_, d, h) = given.qkv.shape, start.shape
    context = start.new_empty(images, tokens, d)
    shapes = kept_shapes(images, tokens, d, h, settings)
    kept = Kept(*(start.new_empty(shape if keep else 0) for shape in shapes))
    _run(
        "forward",
        settings,
        qkv=given.qkv.to(start.dtype).contiguous(),
        start=start,
        generator_weight=given.generator_weight.contiguous(),
        generator_bias=given.generator_bias,
        context=context,
        **(kept._asdict() if keep else {}),
    )
    return context.to(given.qkv.dtype), kept


def backward(dy: Tensor, given: Given, kept: Kept, settings: Settings) -> Gradients:
    """Gradients of what was given."""
    start = given.start
    d_qkv = torch.empty_like(given.qkv, dtype=start.dtype, memory_format=torch.contiguous_format)
    d_starts = start.new_empty(2, len(given.qkv), *start.shape[1:])
    d_logits = torch.empty_like(kept.factors)
    _run(
        "backward",
        settings,
        qkv=given.qkv.to(start.dtype).contiguous(),
        scales=kept.scales,
        start=start,
        generator_weight=given.generator_weight.contiguous(),
        states=kept.states,
        factors=kept.factors,
        errors=kept.errors,
        d_context=dy.to(start.dtype).contiguous(),
        d_qkv=d_qkv,
        d_starts=d_starts,
        d_logits=d_logits,
    )
    return Gradients(d_qkv.to(given.qkv.dtype), d_starts.sum(1), d_logits)
