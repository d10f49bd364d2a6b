"""Weights that differ: checksums of what every rank holds alike."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from convneur.system.world import World


def difference(tensors: Iterable[tuple[str, Tensor]], world: World) -> str | None:
    """Says which ranks' tensors differ from those of most; None where all are alike. Collective.

    Args:
        tensors: names and values of what every rank should hold alike, in the same order on all of them.
        world: this process among the ranks.
    """
    held = [(name, checksum(tensor)) for name, tensor in tensors]
    if not held:
        return None
    names, sums = zip(*held, strict=True)
    gathered = [torch.empty(len(sums), dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(gathered, torch.stack(sums).cpu(), world.control)
    return odd_ranks(torch.stack(gathered), names)


def checksum(tensor: Tensor) -> Tensor:
    """A number, int64 on the tensor's device, that any single flipped bit changes: the sum of its 32-bit words.

    Tensors of 16 and of 8 bits an element are summed by words of these.
    """
    word = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    return tensor.detach().contiguous().view(-1).view(word).sum(dtype=torch.int64)


def odd_ranks(sums: Tensor, names: Sequence[str]) -> str | None:
    """Says which ranks' checksums (ranks, tensors) differ from those of most, and where first; None where none do."""
    rows = [tuple(row) for row in sums.tolist()]
    counts = {row: rows.count(row) for row in rows}
    if len(counts) == 1:
        return None
    usual = max(counts, key=lambda row: counts[row])
    tensor = next(i for i in range(len(names)) if len({row[i] for row in rows}) > 1)
    if counts[usual] * 2 <= len(rows):
        return f"the ranks hold different values of {names[tensor]}; which of them is wrong, so few can't tell"
    odd = [str(rank) for rank, row in enumerate(rows) if row != usual]
    return f"rank {' and '.join(odd)} holds other values of {names[tensor]} than the other ranks"
