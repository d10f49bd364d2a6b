"""Failing together: what goes wrong on one rank is known to all, before they wait for it in vain."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from convneur.world import World


@contextmanager
def together(world: World, error: type[Exception], doing: str) -> Iterator[None]:
    """Runs a block, and learns how the other ranks have fared with it. Collective; the block itself must not be.

    Args:
        world: this process among the ranks.
        error: what to raise.
        doing: what the block does, for the message.

    Raises:
        error: the block failed on some rank; raised on all of them, with every failed rank and its reason.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as caught:
        failure = caught
    reasons: list[str | None] = [None] * world.size
    reason = f"{type(failure).__name__}: {failure}" if failure else None
    dist.all_gather_object(reasons, reason, world.control)
    failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    if failed:
        raise error(f"{doing} failed on {'; '.join(failed)}") from failure
