"""The order in which an epoch shows a dataset: a pure function of (seed, epoch), for any number of ranks and workers.

Samples shall come in an order as good as random, but be read nearly in sequence from shards that may lie on a server.

Notation: N samples, numbered 0..N-1 shard by shard; L lanes; B samples an optimizer step; W shards a window; K repeats;
n = (N // B) B / L samples a lane.

1. Ring. The shards are put in random order and joined, end to end, to a ring of N places. It is entered at a random
   place.
2. Lanes. From there on, a lane of n places begins every N // L places. What lies between the lanes doesn't fill a
   batch, fewer than B samples; they sit this epoch out. As the entry is random, each sample has the same chance of
   that.
3. Shuffle. The ends of lanes cut shards, so a lane consists of spans: contiguous samples of one shard. Its spans are
   put in random order, and then the samples within each window, that is within W spans in a row. So a lane reads W
   shards at a time, and all lanes about L W.
4. Repeats. With K > 1 a lane shows only the first n / K samples of its order, rounded up, each of them K times in a
   row.
5. Steps. Step t takes places t B/L to (t + 1) B/L - 1 of every lane. Ranks own whole lanes, so a step has the same
   samples for any number of ranks. With K > 1 the second half of a lane's share is reversed: mixup pairs first with
   last, and shall not meet two views of one sample.

Blocks. Shards that are sorted by class make poor windows. So the dataset may be cut into blocks of contiguous samples
that take the place of the shards in all of this; a window then has as many blocks as make up W shards of average size.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from convneur.data.keys import key, permutation, raw_bits


class LaneOrder:
    """Which sample is read at which epoch, step and lane.

    Nothing but the current epoch's lanes is kept in memory, and only those that were asked for: 4 bytes a sample, and
    some 40 a shard or block. Building all lanes of 1,282 shards and 1.28 million samples takes 0.12 s.

    Args:
        shard_sizes: samples in each shard, (shards,); their sum is N.
        seed: the run's seed.
        lanes: L; divides `batch_size`.
        batch_size: B; not above N.
        window: W.
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
            average = self._samples / max(int(np.count_nonzero(self._sizes)), 1)
            self._sizes = np.minimum(block, self._samples - np.arange(0, self._samples, block))
            window = max(round(window * average / block), min(window, 1))  # a window below 1 stays an error
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
        self._kept_as = np.uint32 if self._samples <= 1 << 32 else np.int64
        self._epoch = -1  # none yet; what follows is of this epoch
        self._ring: tuple[np.ndarray, np.ndarray] = self._sizes, self._sizes  # shards in their order, and their ends
        self._lanes: dict[int, np.ndarray] = {}

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
                self._lanes[lane] = self._shuffled(epoch, lane).astype(self._kept_as)
        taken = self._places(step) // self._repeats
        return np.stack([self._lanes[lane][taken] for lane in lanes]).astype(np.int64)

    def lane(self, epoch: int, lane: int) -> np.ndarray:
        """The samples that a lane reads in an epoch, in its order and each once, int64. They aren't kept."""
        self._enter(epoch)
        return self._shuffled(epoch, lane)[: -(-self._lane_size // self._repeats)]

    def repetitions(self, step: int) -> np.ndarray:
        """Which of its sample's K showings each place of a lane's share in a step is, (B/L,) int64, 0..K-1."""
        return self._places(step) % self._repeats

    def _places(self, step: int) -> np.ndarray:
        """Places that a step takes of each lane, (B/L,) int64; see 5."""
        places = np.arange(step * self._share, (step + 1) * self._share)
        if self._repeats > 1:
            half = self._share // 2
            places[half:] = places[half:][::-1].copy()
        return places

    def _enter(self, epoch: int) -> None:
        """Lays the ring of an epoch, see 1: the order of the shards, and at which place each ends."""
        if epoch != self._epoch:
            shards = permutation(len(self._sizes), self._seed, "shards", epoch)
            self._epoch, self._lanes, self._ring = epoch, {}, (shards, np.cumsum(self._sizes[shards]))

    def _shuffled(self, epoch: int, lane: int) -> np.ndarray:
        """All n samples of a lane in the order of reading, int64; see 3."""
        firsts, lengths = self._spans(epoch, lane)
        order = permutation(len(firsts), self._seed, "spans", epoch, lane)
        firsts, lengths = firsts[order], lengths[order]
        ends = np.cumsum(lengths)
        # Place p of the lane lies in a span s, and is sample firsts[s] + p - (where s begins in the lane).
        samples: np.ndarray = np.arange(self._lane_size) + np.repeat(firsts - (ends - lengths), lengths)
        bits = raw_bits(self._lane_size, self._seed, "samples", epoch, lane)
        edges = [0, *ends[self._window - 1 : -1 : self._window], self._lane_size]
        for begin, end in pairwise(edges):
            samples[begin:end] = samples[begin:end][np.argsort(bits[begin:end], kind="stable")]
        return samples

    def _spans(self, epoch: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """First samples and lengths of a lane's spans, each (spans,) int64, in the order of the ring; see 2."""
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
