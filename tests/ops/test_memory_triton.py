"""The memory's Triton kernels against the plain version: on a GPU, or else in Triton's interpreter, in a process of its
own because Triton reads that setting when it is first imported. And without a GPU still: that they compile for one.
"""

import os
import subprocess
import sys
from typing import get_args

import pytest
import torch

from convneur.models.convneur.config import MemoryConfig
from convneur.models.convneur.memory import NeuralMemory
from convneur.ops.memory import eager
from convneur.ops.memory.reading import ReadOrder

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_KERNELS = INTERPRETED or torch.cuda.is_available()
kernels = pytest.mark.skipif(not RUNS_KERNELS, reason="runs in the interpreter's process")

READS = get_args(ReadOrder)
CHUNK = 40  # more rows than a tile has, and no multiple of them


@pytest.mark.skipif(RUNS_KERNELS, reason="the kernels run in this process")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" in run.stdout  # this test there, and the compilation
    assert " passed" in run.stdout


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """Fills what torch.empty returns with NaN, so that no result can depend on it unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(memory: NeuralMemory, implementation: str, qkv: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Context, and the gradients of qkv and of the parameters that the recurrence takes."""
    memory.implementation = implementation
    qkv = qkv.clone().requires_grad_()
    wanted = [qkv, memory.w1, memory.w2, memory.generator_weight, memory.generator_bias]
    context = memory.recurrence(qkv)
    return [context.detach(), *torch.autograd.grad(context, wanted, dy)]


@kernels
@pytest.mark.parametrize(
    ("read", "dim", "length", "dtype"),
    [
        *((read, 20, 2 * CHUNK + 17, torch.float32) for read in READS),
        *((read, 16, 3 * CHUNK, torch.bfloat16) for read in READS),
        ("before_update", 40, CHUNK + 1, torch.float32),
        ("before_update", 32, CHUNK + 1, torch.bfloat16),
        ("before_update", 72, CHUNK + 1, torch.float32),
        ("after_update", 20, 1, torch.float32),
    ],
)
def test_outputs_and_gradients_equal_the_plain_version(
    read: str, dim: int, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(dim, MemoryConfig(CHUNK, 1.0, read))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    memory.to(DEVICE)
    qkv, dy = (torch.randn(2, length, width).to(DEVICE, dtype) for width in (3 * dim, dim))
    expected = run(memory, "plain", qkv, dy)
    for name in ("forward", "backward"):
        monkeypatch.delattr(eager, name)  # nothing falls back
    actual = run(memory, "auto", qkv, dy)
    names = ["context", "qkv", "w1", "w2", "generator_weight", "generator_bias"]
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.dtype == e.dtype
        # The interpreter truncates to bfloat16, a GPU rounds; tensor cores multiply float32 in three parts.
        tolerance = 2**-7 if a.dtype == torch.bfloat16 else 1e-5
        assert ((a - e).norm() / e.norm()).item() < tolerance, name


@kernels
@pytest.mark.parametrize("read", READS)
def test_without_gradients_two_states_are_enough(read: str) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(16, MemoryConfig(16, 1.0, read)).to(DEVICE)
    qkv = torch.randn(2, 5 * 16, 48, device=DEVICE)
    with torch.no_grad():
        context = memory.recurrence(qkv)
    torch.testing.assert_close(context, memory.recurrence(qkv).detach(), rtol=0.0, atol=0.0)


@kernels
def test_falls_back_where_kernels_do_not_fit() -> None:
    """Wider than the registers hold, and in float64."""
    torch.manual_seed(0)
    for dim, dtype in ((132, torch.float32), (8, torch.float64)):
        memory = NeuralMemory(dim, MemoryConfig(3)).to(DEVICE, dtype)
        tokens = torch.randn(1, 7, dim, device=DEVICE, dtype=dtype)
        context = memory(tokens)
        memory.implementation = "plain"
        torch.testing.assert_close(context, memory(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu_that_is_not_here(capability: int) -> None:
    """Down to machine code, in the shared memory that every NVIDIA GPU since Ampere has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from convneur.ops.memory import triton as kernels

    d = 40
    for kernel, is_backward in ((kernels._forward_kernel, False), (kernels._backward_kernel, True)):
        tiles = kernels._tiles(d, is_backward)
        options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
        constants = {"d": d, "h": 4 * d, "keep_states": True, "prec": "tf32"} | tiles | {"prec": "tf32"}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = dict.fromkeys(("qkv", "y", "dy", "d_qkv"), "*bf16") | {"plan": "*i32", "inner_lr": "fp32"}
        types |= dict.fromkeys(("images", "tokens", "written", "longest", "number_of_steps", "count"), "i32")
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
        assert compiled.metadata.shared <= 99 * 1024
        assert "cubin" in compiled.asm
