"""The order of an epoch: a pure function of (seed, epoch), the same for every number of ranks and workers.

Legend: N samples, L lanes, B global batch size, W window, K repeats, n = (N // B) B / L samples a lane.

0. Where blocks are asked for, the dataset is cut into blocks of so many contiguous samples, and they stand for the
   shards in what follows; a window then has as many blocks as make up W shards of average size.
1. The shards are permuted and laid end to end on a ring, which is entered at a random place.
2. From there on, every N // L places, a lane of n samples is cut out. Cuts split shards, so a lane consists of spans:
   contiguous pieces of shards. The fewer than B samples between the lanes don't fill a batch and sit this epoch out;
   as the ring is entered anywhere, each sample has the same chance of that.
3. In each lane the spans are permuted and, within windows of W spans, the samples. A reader thus touches about L W
   shards at a time, each nearly in sequence.
   With K repeats only the first n / K samples (rounded up) of this order are read, each K times in a row.
4. Step t takes samples t B/L to (t+1) B/L of each lane. Ranks own whole lanes, so the step is the same for any number
   of ranks. With repeats the second half is reversed: mixup pairs first with last, and shall not meet two views of one
   sample.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from convneur.data.keys import key, permutation, raw_bits


class LaneOrder:
    """Which sample is read at which epoch, step and lane.

    Samples are numbered 0..N-1 shard by shard. Nothing but the current epoch's lanes is kept in memory, and only those
    that were asked for: 4 bytes a sample, and some 40 a shard or block. Building all lanes of 1,282 shards and 1.28
    million samples takes 0.12 s.

    Args:
        shard_sizes: samples in each shard, (shards,); their sum is N.
        seed: the run's seed.
        lanes: L; divides `batch_size`.
        batch_size: B, samples an optimizer step; not above N.
        window: W, spans that are shuffled together.
        repeats: K, how often a sample is shown before the next one.
        block: samples in a block; 0 leaves the shards whole.

    Raises:
        ValueError: the arguments contradict each other; `check_data` finds it earlier and says what to do.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        *,
        seed: int,
        lanes: int,
        batch_size: int,
        window: int,
        repeats: int = 1,
        block: int = 0,
    ):
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._samples = int(self._sizes.sum())
        if block:
            shard = self._samples / max(int(np.count_nonzero(self._sizes)), 1)
            self._sizes = np.minimum(block, self._samples - np.arange(0, self._samples, block))
            window = max(round(window * shard / block), min(window, 1))
        self._firsts = np.cumsum(self._sizes) - self._sizes
        least = min(lanes, window, repeats, block + 1)
        if least < 1 or batch_size % lanes or not 0 < batch_size <= self._samples:
            raise ValueError(
                f"no order of {self._samples} samples with batch size {batch_size}, {lanes} lanes and window {window}"
            )
        self._seed, self._num_lanes, self._window = seed, lanes, window
        self._share, self._repeats = batch_size // lanes, repeats
        self.steps_per_epoch = self._samples // batch_size
        self._lane_size = self.steps_per_epoch * self._share
        self._epoch = -1
        self._lanes: dict[int, np.ndarray] = {}
        self._ring: tuple[np.ndarray, np.ndarray] = self._sizes, self._sizes
        self._number = np.uint32 if self._samples <= 1 << 32 else np.int64

    def samples(self, epoch: int, step: int, lanes: range) -> np.ndarray:
        """The samples that `lanes` contribute to a step.

        Args:
            epoch: counted from 0.
            step: optimizer step within the epoch, 0..steps_per_epoch-1.
            lanes: lanes to read, each in 0..L-1.

        Returns:
            (len(lanes), B/L) int64 sample numbers.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        self._enter(epoch)
        for lane in lanes:
            if lane not in self._lanes:
                self._lanes[lane] = self._lane(epoch, lane).astype(self._number)
        taken = self._places(step) // self._repeats
        return np.stack([self._lanes[lane][taken] for lane in lanes]).astype(np.int64)

    def lane(self, epoch: int, lane: int) -> np.ndarray:
        """The samples that a lane reads in an epoch, in its order and each once, int64. They aren't kept."""
        self._enter(epoch)
        return self._lane(epoch, lane)[: -(-self._lane_size // self._repeats)]

    def repetitions(self, step: int) -> np.ndarray:
        """Which showing of its sample in the epoch each of a lane's is, (B/L,) int64, 0..K-1, in each lane alike."""
        return self._places(step) % self._repeats

    def _places(self, step: int) -> np.ndarray:
        """Places in a lane that a step takes, (B/L,) int64."""
        places = np.arange(step * self._share, (step + 1) * self._share)
        if self._repeats > 1:
            half = self._share // 2
            places[half:] = places[half:][::-1].copy()
        return places

    def _enter(self, epoch: int) -> None:
        """Lay out the shards of an epoch: their order on the ring, and where each ends."""
        if epoch != self._epoch:
            shards = permutation(len(self._sizes), self._seed, "shards", epoch)
            self._epoch, self._lanes, self._ring = epoch, {}, (shards, np.cumsum(self._sizes[shards]))

    def _lane(self, epoch: int, lane: int) -> np.ndarray:
        """All n samples of a lane in the order of reading."""
        firsts, lengths = self._spans(epoch, lane)
        spans = permutation(len(firsts), self._seed, "spans", epoch, lane)
        firsts, ends = firsts[spans], np.cumsum(lengths[spans])
        # Position p of the lane lies in span s and is sample firsts[s] + p - (end of the span before).
        samples: np.ndarray = np.arange(self._lane_size) + np.repeat(firsts - (ends - lengths[spans]), lengths[spans])
        bits = raw_bits(self._lane_size, self._seed, "samples", epoch, lane)
        edges = [0, *ends[self._window - 1 : -1 : self._window], self._lane_size]
        for begin, end in pairwise(edges):
            samples[begin:end] = samples[begin:end][np.argsort(bits[begin:end], kind="stable")]
        return samples

    def _spans(self, epoch: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """First samples and lengths of a lane's spans, each (spans,) int64, in the order of the ring."""
        shards, ends = self._ring
        entry = key(self._seed, "entry", epoch) % self._samples
        start = (entry + lane * (self._samples // self._num_lanes)) % self._samples
        stop = start + self._lane_size
        pieces = []
        for low, high in ((start, min(stop, self._samples)), (0, stop - self._samples)):  # the second where it wraps
            reached = slice(np.searchsorted(ends, low, "right"), np.searchsorted(ends, high) + 1)
            begins = ends[reached] - self._sizes[shards[reached]]
            lows, highs = np.maximum(begins, low), np.minimum(ends[reached], high)
            cut = lows < highs
            pieces.append((self._firsts[shards[reached][cut]] + (lows - begins)[cut], (highs - lows)[cut]))
        (firsts, lengths), (wrapped_firsts, wrapped_lengths) = pieces
        return np.concatenate([firsts, wrapped_firsts]), np.concatenate([lengths, wrapped_lengths])
