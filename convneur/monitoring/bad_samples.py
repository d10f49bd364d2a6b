"""Unreadable training samples, added up over all ranks, and the end of a run that meets too many of them."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from convneur.data.config import DataConfig
from convneur.data.errors import InputError

NAMED = 10
"""How many samples the final message names; the run's log has named all by then."""


class BadSampleCount:
    """How many different samples the ranks have found unreadable, against how many there may be.

    Args:
        config: has bad_limit and what the message names.
        samples: training samples there are.
        found: what this rank has met, number in the store to reason; the loader adds to it.
        device: where collectives take their tensors.
    """

    def __init__(self, config: DataConfig, samples: int, found: Mapping[int, str], device: torch.device) -> None:
        self._config, self._found, self._device = config, found, device
        self._allowed = math.floor(config.bad_limit * samples if config.bad_limit < 1 else config.bad_limit)
        self._known: dict[int, str] = {}

    def update(self) -> list[str]:
        """What the ranks together have met since the last call, one line a sample. Collective."""
        new = {index: reason for index, reason in self._found.items() if index not in self._known}
        count = torch.tensor(len(new), device=self._device)
        dist.all_reduce(count)
        if not count.item():
            return []
        gathered: list[dict[int, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, new)
        merged = {index: reason for part in gathered for index, reason in part.items() if index not in self._known}
        self._known |= merged
        return [merged[index] for index in sorted(merged)]

    def check(self) -> None:
        """Raises InputError, on all ranks alike, if more samples are unreadable than `data.bad_limit` allows."""
        if len(self._known) > self._allowed:
            named = [self._known[index] for index in sorted(self._known)[:NAMED]]
            more = len(self._known) - len(named)
            raise InputError(
                f"{len(self._known)} training samples can't be read, and data.bad_limit {self._config.bad_limit:g} "
                f"allows {self._allowed}: {' | '.join(named)}{f' | and {more} more' if more else ''}; to train without "
                f"them run `convneur data verify {self._config.root}` and start again"
            )
