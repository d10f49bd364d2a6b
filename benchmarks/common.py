"""What several benchmarks have in common: their flags, how they time, and what they print and write."""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script, line by line."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_timing_flags(
    parser: argparse.ArgumentParser, *, modes: list[str], batch_size: int, warmup: int, runs: int
) -> None:
    """The flags of a script that times models on one device, with its defaults."""
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=modes)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast (default: float32)")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--warmup", type=int, default=warmup)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--out", type=Path, help="JSON file to write")


def synchronize(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def alternating_seconds(
    steps: Mapping[str, Callable[[], None]], runs: int, device: torch.device
) -> dict[str, list[float]]:
    """Wall times of every step, `runs` of each; they take turns, so that a busy spell of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return times


def processor_seconds() -> float:
    """What this process and those children of it that have ended have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def processor_name() -> str:
    """What the system calls the CPU."""
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """What computes, in words."""
    return torch.cuda.get_device_name() if device == "cuda" else processor_name()


def machine_in_words(device: str) -> str:
    """What computes, by how many threads and which PyTorch."""
    return f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def row(cells: Iterable[object]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def write_results(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Writes what was measured, where and with which flags, to the file that --out names, if it does."""
    if args.out:
        flags = {key: value for key, value in vars(args).items() if key != "out"}
        machine = {"device": device_name(args.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.out.write_text(json.dumps({**machine, **flags, "results": results}, indent=2))
