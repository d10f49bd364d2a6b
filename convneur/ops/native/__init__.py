"""The C++ sources of this folder, compiled for this processor when first used.

That takes a few seconds and the C++ compiler that $CXX names, or else c++; what was compiled stays in the user's cache
folder. Where it can't be had, a warning says so, and PyTorch's operations compute the same, but for rounding.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from convneur.data.files import atomic_write

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / name for name in ("memory.cpp", "block.cpp")]
HEADERS = [FOLDER / name for name in ("vectors.h", "depthwise.h")]
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-march=native", "-fopenmp", "-shared", "-fPIC")
LONGEST_BUILD = 300  # seconds


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


_unused: ContextVar[bool] = ContextVar("unused", default=False)


@contextmanager
def unused() -> Iterator[None]:
    """A block that does without, so that nothing is compiled, as on a login node for a single pass."""
    token = _unused.set(True)
    try:
        yield
    finally:
        _unused.reset(token)


def library() -> ctypes.CDLL | None:
    """The compiled sources; None, after a warning, where it can't be had."""
    return None if _unused.get() else _library()


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return _load_or_compile(_cache_folder() / f"native-{_key()}.so")
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [str(error)]
        reason = f"{shlex.join(compiler())} failed: {next((line for line in lines if 'error:' in line), lines[-1])}"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = f"{error}"
        if shutil.which(compiler()[0]) is None:
            reason = f"there is no C++ compiler {compiler()[0]!r}; install g++ (apt-get install g++), or set CXX"
    warnings.warn(f"models will be slower on this CPU, the neural memory up to three times: {reason}", stacklevel=3)
    return None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convneur"


def _key() -> str:
    """Differs where another library would be made: a home folder may be shared by machines of several kinds."""
    parts = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts += [*FLAGS, *compiler(), str(compiler_version()), platform.machine(), platform.processor()]
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
            command = [*compiler(), *FLAGS, *map(str, SOURCES), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)
            with atomic_write(path) as file:  # other processes may be at it, too
                file.write(made.read_bytes())
    return ctypes.CDLL(str(path))
