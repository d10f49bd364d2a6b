"""Failing together: what goes wrong on one rank is known to all, before they wait for it in vain."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from convneur.data.errors import InputError, StorageError, is_outage
from convneur.errors import TrainingError
from convneur.system.world import World


@contextmanager
def together(world: World, error: type[Exception], doing: str) -> Iterator[None]:
    """Runs a block, and learns how the other ranks have fared with it. Collective; the block itself must not be.

    Args:
        world: this process among the ranks.
        error: what to raise.
        doing: what the block does, for the message.

    Raises:
        error: the block failed on some rank; raised on all of them, with every failed rank and its reason. Where
            storage didn't answer one of them, it is an outage on all.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as caught:
        failure = caught
    answers: list[tuple[str, bool] | None] = [None] * world.size
    answer = (f"{type(failure).__name__}: {failure}", is_outage(failure)) if failure else None
    dist.all_gather_object(answers, answer, world.control)
    failed = {rank: answer for rank, answer in enumerate(answers) if answer}
    if not failed:
        return
    reasons = "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in failed.items())
    outage = StorageError(reasons) if any(outage for _, outage in failed.values()) else None
    raise error(f"{doing} failed on {reasons}") from outage or failure


@contextmanager
def led(world: World) -> Iterator[None]:
    """A block in which rank 0 does by itself what may fail: where it fails, all ranks raise alike.

    Collective; the block itself must not be.

    Raises:
        Exception: what rank 0 has raised; on the others a StorageError for an outage, and a TrainingError for what is
            neither bad input nor of the operating system.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as caught:
        failure = caught
    agreed = [_sendable(failure) if failure and world.is_main else None]
    dist.broadcast_object_list(agreed, group=world.control)
    if error := failure or agreed[0]:
        raise error


def _sendable(error: Exception) -> Exception:
    """An exception that says the same without what it was raised for."""
    if is_outage(error):
        return StorageError(str(error))
    return error if isinstance(error, InputError | OSError) else TrainingError(f"{type(error).__name__}: {error}")
