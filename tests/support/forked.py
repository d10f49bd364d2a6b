"""Processes that a server forks, which has imported what they need: real ones, without the seconds of their imports.

A test process has one such server. What tests a command line starts that command instead.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch


def server() -> ForkServerContext:
    """Whose processes are forked; those who start processes by `multiprocessing` themselves call it before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported_by_ranks"])
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def run_ranks(script: Path, *words: object, size: int = 2, timeout: float = 1200) -> str:
    """Runs `python SCRIPT WORDS` in as many ranks, as torchrun does; returns what they print, rank by rank."""
    port = free_port()
    with TemporaryDirectory(prefix="convneur-ranks-") as folder:
        said = [Path(folder, str(rank)) for rank in range(size)]
        arguments = [(script, [*map(str, words)], rank, size, port, said[rank]) for rank in range(size)]
        ranks = [server().Process(target=_run, args=each) for each in arguments]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        while (left := [rank.sentinel for rank in ranks if rank.exitcode is None]) and time.monotonic() < deadline:
            if any(rank.exitcode for rank in ranks):
                break  # the others would wait for it
            wait(left, deadline - time.monotonic())
        status = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        errors = [f"rank {path.name}: {path.with_suffix('.err').read_text()[-4000:]}" for path in said]
        ended = f"{script.name} ended with {status}; None had {timeout} s, or until another failed"
        assert status == [0] * size, "\n".join([ended, *errors])
        return "".join(path.with_suffix(".out").read_text() for path in said)


def _run(script: Path, words: list[str], rank: int, size: int, port: int, said: Path) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(said.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
