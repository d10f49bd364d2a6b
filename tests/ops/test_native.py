"""Compiling the C++ sources: for other processors, by several processes at once, and where it can't be done."""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from convneur.data.compiled import compiler
from convneur.models.convneur.config import MemoryConfig, ModelConfig
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.model import ConvNeur
from convneur.ops import native

pytestmark = pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="there is no C++ compiler")
ONE_CALL = """
import torch
from convneur.models.convneur.config import MemoryConfig
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
torch.manual_seed(0)
with torch.no_grad():
    print(NeuralMemory(4, MemoryConfig(3))(torch.randn(1, 8, 4)).flatten()[-4:].tolist())
    print(ConvNeur(ModelConfig("8x1-1-1-1", 4)).eval()(torch.randn(1, 3, 64, 96)).flatten().tolist())
"""


def compute(dtype: torch.dtype) -> list[torch.Tensor]:
    """What the kernels make of the same numbers: context, gradient and, of float32, the features of a stage."""
    torch.manual_seed(0)
    memory = NeuralMemory(20, MemoryConfig(80))
    stage = ConvNeur(ModelConfig("20x2-1-1-1", memory=MemoryConfig(40), layer_scale=0.5)).stages[0]
    for parameter in (*memory.parameters(), *stage.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    qkv, dy, x = torch.randn(3, 177, 60), torch.randn(3, 177, 20), torch.randn(3, 20, 11, 9)
    qkv, dy = qkv.to(dtype).requires_grad_(), dy.to(dtype)
    context = memory.to(dtype).recurrence(qkv)
    results = [context.detach(), *torch.autograd.grad(context, qkv, dy)]
    if dtype == torch.float32:
        with torch.no_grad():
            results.append(stage(x))
    return results


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names processors by x86's names")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_other_vector_lengths(processor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if processor == "haswell" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    expected = compute(torch.float64) + compute(torch.float32)
    flags = [f"-march={processor}" if flag.startswith("-march") else flag for flag in native.SOURCES.flags]
    monkeypatch.setattr(native, "SOURCES", native.SOURCES._replace(flags=flags))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = native._library.__wrapped__()
    monkeypatch.setattr(native, "library", lambda: compiled)
    actual = compute(torch.float64) + compute(torch.float32)
    assert len(actual) == 5
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() / e.norm() < (1e-13 if a.dtype == torch.float64 else 2e-6)
    assert len([*(tmp_path / "convneur").glob("native-*.so")]) == 1


def one_call(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own with an empty cache."""
    env = os.environ | {"XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", ONE_CALL], env=env, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C++ compiler 'no-such-compiler'; install g++"), ("false", "false failed: ")],
)
def test_goes_on_without_a_compiler(compiler: str, reason: str, tmp_path: Path) -> None:
    without = one_call(tmp_path, CXX=compiler)
    assert without.returncode == 0, without.stderr
    assert without.stderr.count("models will be slower on this CPU, the neural memory up to three times: ") == 1
    assert reason in without.stderr
    assert not [*tmp_path.glob("convneur/*")]
    usual = one_call(tmp_path)
    assert "slower" not in usual.stderr
    numbers = [[number for line in run.stdout.splitlines() for number in json.loads(line)] for run in (without, usual)]
    assert len(numbers[0]) == 8
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-7)


def test_goes_on_without_a_cache(tmp_path: Path) -> None:
    (tmp_path / "convneur").write_text("a file where the folder should be")
    without = one_call(tmp_path)
    assert without.returncode == 0, without.stderr
    assert "up to three times: [Errno 17] File exists" in without.stderr


def test_processes_may_compile_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        runs = [*pool.map(one_call, [tmp_path] * 3)]
    assert [run.returncode for run in runs] == [0] * 3, [run.stderr for run in runs]
    assert len({run.stdout for run in runs}) == 1
    assert not any("slower" in run.stderr for run in runs)
    assert len([*tmp_path.glob("convneur/*.so")]) == 1
