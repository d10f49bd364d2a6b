"""C++ sources compiled for this processor when first used.

That takes a few seconds and the C++ compiler that $CXX names, or else c++; what was compiled stays in the user's cache
folder. Where it can't be had, a warning says so once.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from convneur.data.files import atomic_write

LONGEST_BUILD = 300  # seconds


class Sources(NamedTuple):
    """A shared library to be.

    Attributes:
        name: what its file is called.
        files: what is compiled.
        headers: what those include.
        flags: the compiler's, without those that every library has.
        loss: what is lost where it can't be had.
    """

    name: str
    files: Sequence[Path]
    headers: Sequence[Path]
    flags: Sequence[str]
    loss: str

    def load(self) -> ctypes.CDLL | None:
        """The library, compiled unless it has been; None, after a warning, where it can't be had."""
        try:
            return _load_or_compile(self)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [str(error)]
            reason = f"{shlex.join(compiler())} failed: {next((line for line in lines if 'error:' in line), lines[-1])}"
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            reason = f"{error}"
            if shutil.which(compiler()[0]) is None:
                reason = f"there is no C++ compiler {compiler()[0]!r}; install g++ (apt-get install g++), or set CXX"
        warnings.warn(f"{self.loss}: {reason}", stacklevel=4)
        return None

    def command(self, made: Path) -> list[str]:
        """What compiles it."""
        return [*compiler(), "-std=c++17", "-shared", "-fPIC", *self.flags, *map(str, self.files), "-o", str(made)]


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


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convneur"


def _key(sources: Sources) -> str:
    """Differs where another library would be made: a home folder may be shared by machines of several kinds."""
    parts = [path.read_text() for path in (*sources.files, *sources.headers)]
    parts += [*sources.flags, *compiler(), str(compiler_version()), platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        wanted = ("model name", "flags", "CPU part", "Features")
        parts += dict.fromkeys(line for line in cpuinfo.read_text().splitlines() if line.startswith(wanted))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _load_or_compile(sources: Sources) -> ctypes.CDLL:
    path = _cache_folder() / f"{sources.name}-{_key(sources)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if not path.exists():
                _compile(sources, path)
    return ctypes.CDLL(str(path))


def _compile(sources: Sources, path: Path) -> None:
    with TemporaryDirectory(prefix="convneur-") as folder:
        made = Path(folder) / path.name
        subprocess.run(sources.command(made), check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)
        with atomic_write(path) as file:  # where there are no locks, other processes may be at it, too
            file.write(made.read_bytes())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A block that one process at a time is in: the ranks of a node start together. Not where there are no locks."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
