"""What /proc says about processes of this machine."""

from pathlib import Path


def start_time(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None where there is no such process.

    With its number it names a process for good: numbers come round again.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def is_alive(pid: int, started: int | None) -> bool:
    """Whether a process still runs, or is stopped. One that has ended and waits to be noticed doesn't."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in ("Z", "X") and started in (None, int(fields[19]))


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal, and may go on."""
    return _stat(pid)[:1] == ["T"]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, of which the first is the state."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return []
    return text.rpartition(b")")[2].decode().split()
