"""The memory's kernel in C++ beside PyTorch's rounding; tests/ops/test_memory.py has the oracle in float64."""

import shutil

import pytest
import torch

from convneur.data.compiled import compiler
from convneur.models.convneur.config import MemoryConfig
from convneur.models.convneur.memory import NeuralMemory
from convneur.ops.memory import eager

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="there is no C++ compiler"),
]
CHUNK = 80  # more tokens than a tile has, and no multiple of them


def run(implementation: str, dim: int, dtype: torch.dtype, std: float = 0.3, images: int = 3) -> list[torch.Tensor]:
    """Context, and the gradients of qkv and of the parameters that the recurrence takes."""
    torch.manual_seed(0)
    memory = NeuralMemory(dim, MemoryConfig(CHUNK))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=std)
    memory.to(dtype).implementation = implementation  # type: ignore[assignment]
    qkv, dy = (torch.randn(images, 2 * CHUNK + 17, width).to(dtype) for width in (3 * dim, dim))
    qkv.requires_grad_()
    wanted = [qkv, memory.w1, memory.w2, memory.generator_weight, memory.generator_bias]
    context = memory.recurrence(qkv)
    return [context.detach(), *torch.autograd.grad(context, wanted, dy)]


def errors(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("dim", [3, 16, 20, 64])
@pytest.mark.parametrize("std", [0.1, 0.4])
def test_float32_is_as_exact_as_with_pytorch_alone(dim: int, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = run("plain", dim, torch.float64, std)
    fused = errors(run("fused", dim, torch.float32, std), exact)
    for name in ("forward", "backward"):
        monkeypatch.delattr(eager, name)  # nothing falls back
    native = errors(run("auto", dim, torch.float32, std), exact)
    for a, b in zip(native, fused, strict=True):
        assert a < max(3 * b, 1e-6)


def test_threads_and_neighbours_change_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run("auto", 20, torch.float32, images=5)
        torch.set_num_threads(3)
        together = run("auto", 20, torch.float32, images=5)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(together[:2], alone[:2], strict=True):
        assert torch.equal(a, b)
