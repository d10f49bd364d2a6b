"""The memory's kernel in C++: its rounding, the processors it is compiled for, and where it can't be compiled.

tests/test_memory.py holds it against the oracle in float64.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from convneur import memory_fused, memory_native
from convneur.memory import MemoryConfig, NeuralMemory

pytestmark = pytest.mark.skipif(shutil.which(memory_native.compiler()[0]) is None, reason="there is no C++ compiler")
CHUNK = 40  # more tokens than a tile has, and no multiple of them
ONE_CALL = """
import torch
from convneur.memory import MemoryConfig, NeuralMemory
torch.manual_seed(0)
with torch.no_grad():
    print(NeuralMemory(4, MemoryConfig(3))(torch.randn(1, 8, 4)).flatten()[-4:].tolist())
"""


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """Fills what torch.empty returns with NaN, so that no result can depend on it unseen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
        monkeypatch.delattr(memory_fused, name)  # nothing falls back
    native = errors(run("auto", dim, torch.float32, std), exact)
    for a, b in zip(native, fused, strict=True):
        assert a < max(3 * b, 1e-6)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names processors by x86's names")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_other_vector_lengths(processor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if processor == "haswell" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    expected = run("auto", 20, torch.float64), run("auto", 20, torch.float32)
    flags = [f"-march={processor}" if flag.startswith("-march") else flag for flag in memory_native.FLAGS]
    monkeypatch.setattr(memory_native, "FLAGS", flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(memory_native, "library", memory_native.library.__wrapped__)
    assert max(errors(run("auto", 20, torch.float64), expected[0])) < 1e-13
    assert max(errors(run("auto", 20, torch.float32), expected[1])) < 2e-6
    assert [path.suffix for path in (tmp_path / "convneur").iterdir()] == [".so"]


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


def one_call(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own with an empty cache."""
    env = os.environ | {"XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", ONE_CALL], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C++ compiler 'no-such-compiler'; install g++"), ("false", "false failed: ")],
)
def test_goes_on_without_a_compiler(compiler: str, reason: str, tmp_path: Path) -> None:
    without = one_call(tmp_path, CXX=compiler)
    assert without.returncode == 0, without.stderr
    assert without.stderr.count("the neural memory will take up to three times as long on this CPU: ") == 1
    assert reason in without.stderr
    assert not [*tmp_path.glob("convneur/*")]
    usual = one_call(tmp_path)
    assert "as long" not in usual.stderr
    numbers = [[float(number) for number in run.stdout.strip("[]\n").split(",")] for run in (without, usual)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-7)


def test_goes_on_without_a_cache(tmp_path: Path) -> None:
    (tmp_path / "convneur").write_text("a file where the folder should be")
    without = one_call(tmp_path)
    assert without.returncode == 0, without.stderr
    assert "as long on this CPU: [Errno 17] File exists" in without.stderr


def test_processes_may_compile_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        runs = [*pool.map(one_call, [tmp_path] * 3)]
    assert [run.returncode for run in runs] == [0] * 3, [run.stderr for run in runs]
    assert len({run.stdout for run in runs}) == 1
    assert not any("as long" in run.stderr for run in runs)
    assert len([*tmp_path.glob("convneur/*")]) == 1
