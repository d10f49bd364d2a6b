"""Counter-based randomness: every draw is a function of a key, never of what was drawn before.

A key names what is drawn, such as (seed, "augment", epoch, sample). So a draw is the same on every rank and worker, and
resuming replays nothing.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """Hashes `parts` to 64 bits, the same on every machine and in every version."""
    text = "".join(f"s{len(part)}:{part};" if isinstance(part, str) else f"i{int(part)};" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def view_key(seed: int, what: str, epoch: int, sample: int, repetition: int) -> int:
    """Key of what is drawn for the view number `repetition`, from 0 on, of a sample in an epoch."""
    return key(seed, what, epoch, sample, repetition) if repetition else key(seed, what, epoch, sample)


def raw_bits(count: int, *parts: int | str) -> np.ndarray:
    """Draws (count,) uint64 uniform words from Philox keyed by `parts`.

    NumPy promises that a bit generator's words never change; it doesn't promise so for `Generator`'s methods.
    """
    return np.random.Philox(key=key(*parts)).random_raw(count)


def permutation(count: int, *parts: int | str) -> np.ndarray:
    """Draws a uniform permutation of 0..count-1, (count,) int64, keyed by `parts`."""
    return np.argsort(raw_bits(count, *parts), kind="stable")


def seed_libraries(seed: int, device: torch.device | None = None) -> None:
    """Reseeds the global generators that library transforms draw from, in about 20 microseconds.

    These are `random`, `numpy.random`, torch's CPU generator and, where `device` is a GPU, that one's;
    `torch.manual_seed` would reseed every device and takes 30 times as long.

    Args:
        seed: 64 bits, as `key` returns them.
        device: device whose generator is reseeded besides the CPU's.
    """
    random.seed(seed)
    np.random.seed((seed & 0xFFFFFFFF, seed >> 32))
    for generator in _torch_generators(device):
        generator.manual_seed(seed)


@contextmanager
def libraries_restored(device: torch.device | None = None) -> Iterator[None]:
    """Gives the generators that `seed_libraries` reseeds their states back at the end of the block.

    So keyed draws leave no trace in what the rest of the process draws, such as drop path.
    """
    python, legacy = random.getstate(), np.random.get_state(legacy=False)
    states = [(generator, generator.get_state()) for generator in _torch_generators(device)]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for generator, state in states:
            generator.set_state(state)


def _torch_generators(device: torch.device | None) -> list[torch.Generator]:
    if device is None or device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]
