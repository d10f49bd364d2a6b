"""Which process this is among those that train together. Built once, passed on; nothing else reads the environment."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
from torch.distributed import ProcessGroup

from convneur.data.errors import InputError
from convneur.errors import TrainingError
from convneur.system.allocator import keep_freed_memory

# A rank that is gone is noticed when a collective times out, so this bounds how long the others hang.
COLLECTIVE_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class World:
    """Rank 0..size-1 of this process, its rank among those of its node, its device, and a way to talk about control.

    Ranks that agree on something do so over `control`, a group on the CPU, so that no GPU is waited for or needed.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes shared files and speaks to the user."""
        return self.rank == 0

    @staticmethod
    def join() -> "World":
        """Joins the process group that torchrun's environment variables describe: NCCL on GPUs, gloo on CPUs."""
        rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise InputError(f"LOCAL_RANK is {local_rank}, but this process sees {torch.cuda.device_count()} GPUs")
            device, backend = torch.device("cuda", local_rank), "nccl"
            torch.cuda.set_device(device)
        else:
            device, backend = torch.device("cpu"), "gloo"
            keep_freed_memory()
        name_accelerator()
        _meet(backend)
        control = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        return World(rank, local_rank, size, device, cast(ProcessGroup, control))  # every rank is in it

    def leave(self) -> None:
        """Leaves the process group; without it, NCCL aborts a process that has in fact finished."""
        torch.distributed.destroy_process_group()


def _meet(backend: str) -> None:
    """Joins the process group, or says in a line why the ranks can't meet.

    Raises:
        InputError: MASTER_ADDR is no address, or MASTER_PORT taken.
        TrainingError: they can't for another reason.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    where = f"the ranks can't meet at MASTER_ADDR {address}, MASTER_PORT {port}"
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, OverflowError) as error:
        raise InputError(f"{where}: {error}") from error
    try:
        torch.distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if "EADDRINUSE" in reason and "CONVNEUR_FAULTS" not in os.environ:
            raise InputError(f"{where}: something else listens there; give another port") from error
        raise TrainingError(f"{where}: {reason}") from error  # under a supervisor, which gives another port itself


def name_accelerator() -> None:
    """Spares DeepSpeed, where it is imported later, a warning that it had to guess that there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
