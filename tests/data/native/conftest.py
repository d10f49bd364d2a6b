"""The input path's C++ as other processors would have it compiled."""

import ctypes
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from convneur.data import native

FLAGS = {"x86-64": "sse2", "x86-64-v2": "ssse3", "haswell": "avx2", "skylake-avx512": "avx512bw"}
"""What -march names, and a flag of the processors that run it."""


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Compiles what makes pixels for a processor; skips where this one can't run that."""
    folder, built = tmp_path_factory.mktemp("builds"), {}

    def compiled(march: str) -> ctypes.CDLL:
        if march not in built:
            made = folder / f"{march}.so"
            flags = ["-O1", "-ffp-contract=off", f"-march={march}", "-Wall", "-Wextra", "-Werror"]
            command = native.SOURCES._replace(flags=flags).command(made)
            subprocess.run(command, check=True, capture_output=True)
            built[march] = native.bind(ctypes.CDLL(str(made)))
        return built[march]

    return compiled


@pytest.fixture(
    params=["native", "x86-64", "haswell", *[pytest.param(march, marks=pytest.mark.slow) for march in FLAGS]]
)
def each_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, build: Callable) -> None:
    """Each of the libraries in turn."""
    if request.param == "native":
        return
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists() or FLAGS[request.param] not in cpuinfo.read_text():
        pytest.skip(f"this processor isn't {request.param}")
    made = build(request.param)
    monkeypatch.setattr(native, "library", lambda: made)
