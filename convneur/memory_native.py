"""The neural memory's recurrence on CPUs in C++, `memory_native.cpp`, compiled for this processor when first used.

That takes a few seconds and the C++ compiler that $CXX names, or else c++; what was compiled stays in the user's cache
folder. Where it can't be had, a warning says so, and `convneur.memory_fused` computes the same, but for rounding.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from convneur.data.files import atomic_write
from convneur.memory_steps import ReadOrder, steps, updates, written_tokens

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LONGEST_BUILD = 300  # seconds
# A wider memory's state leaves the cache. On an AMD EPYC MKL's products catch up between 384 and 512.
LARGEST_DIM = 256
_NAMES = {torch.float32: "float", torch.float64: "double"}
_C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


def compiler() -> list[str]:
    """The C++ compiler, which needn't be there, and its first arguments."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def compiler_version() -> str | None:
    """The first line of what the compiler says of itself; None where there is none."""
    try:
        answer = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.partition("\n")[0]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled source; None, after a warning, where it can't be had."""
    try:
        return _load_or_compile(_cache_folder() / f"memory_native-{_key()}.so")
    except subprocess.CalledProcessError as error:
        reason = f"{shlex.join(compiler())} failed: {(error.stderr.strip() or str(error)).splitlines()[-1]}"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f"{error}"
        if shutil.which(compiler()[0]) is None:
            reason = f"there is no C++ compiler {compiler()[0]!r}; install g++ (apt-get install g++), or set CXX"
    warnings.warn(f"the neural memory will take up to three times as long on this CPU: {reason}", stacklevel=2)
    return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convneur"


def _key() -> str:
    """Differs where another library would be made: a home folder may be shared by machines of several kinds."""
    parts = [SOURCE.read_text(), *FLAGS, *compiler(), str(compiler_version()), platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        wanted = ("model name", "flags", "CPU part", "Features")
        parts += dict.fromkeys(line for line in cpuinfo.read_text().splitlines() if line.startswith(wanted))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _load_or_compile(path: Path) -> ctypes.CDLL:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="convneur-") as folder:
            made = Path(folder) / path.name
            command = [*compiler(), *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)
            with atomic_write(path) as file:  # other processes may be at it, too
                file.write(made.read_bytes())
    return ctypes.CDLL(str(path))


def fits(qkv: Tensor, d: int) -> bool:
    """Whether the kernel takes these tokens, (B, N, 3d), and can be had."""
    return qkv.is_cpu and d <= LARGEST_DIM and library() is not None


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
    function = getattr(library(), f"{direction}_{_NAMES[like.dtype]}")
    if function(ctypes.byref(problem), torch.get_num_threads()):
        raise MemoryError(f"no memory left for the neural memory of {images} images")


@cache
def _problem(dtype: torch.dtype) -> type[ctypes.Structure]:
    """`Problem` of the source."""
    counts = ("images", "tokens", "written", "steps", "updates", "d", "h")
    read = ("qkv", "scales", "start", "generator_weight", "generator_bias")
    kept = ("states", "surprises", "factors", "errors")
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
    scales: Tensor,
    start: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Context, states, surprises, factors and errors as `memory_fused.forward` returns them; all but the context are
    empty where they aren't kept.
    """
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    count = updates(read, tokens, chunk_length)
    context = scales.new_empty(images, tokens, d)
    shapes = {
        "states": (count, 2, 2, images, d, h),
        "surprises": (count, images, d),
        "factors": (count, images, 3 * d),
        "errors": (images, written_tokens(read, tokens, chunk_length), d),
    }
    kept = {name: scales.new_empty(shape if keep else 0) for name, shape in shapes.items()}
    _run(
        "forward",
        scales,
        chunk_length,
        read,
        inner_lr,
        qkv=qkv.to(scales.dtype).contiguous(),
        scales=scales,
        start=start,
        generator_weight=generator_weight.contiguous(),
        generator_bias=generator_bias,
        context=context,
        **(kept if keep else {}),
    )
    return context.to(qkv.dtype), kept["states"], kept["surprises"], kept["factors"], kept["errors"]


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
