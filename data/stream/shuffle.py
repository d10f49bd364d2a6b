"""How well an epoch's order mixes the classes, beside a full shuffle of the dataset.

Legend: N samples, L lanes, B global batch size, n_k samples of class k.
"""

from typing import NamedTuple

from convneur.data.config import DataConfig
from convneur.data.stores.store import Store
from convneur.data.stream.order import LaneOrder

SAMPLES_MEASURED = 1 << 17
"""At least so many where there are as many; whole lanes, whose last windows may be small."""
NOTICEABLE = 0.01
"""Share of pairs that are of one class beyond chance, from which on it is worth a word."""


class ShuffleQuality(NamedTuple):
    """What an order makes of a dataset's classes.

    Attributes:
        alike: of pairs of samples that are read one after the other in a lane, and of those that mixup mixes, the share
            that is of one class.
        chance: the same in a full shuffle.
        spread: variance of the numbers of a batch's classes over that in a full shuffle, by Kish's design effect of
            samples drawn in clusters: 1 + (B/L - 1) (alike - chance) / (1 - chance).
        pairs: how many were looked at.
    """

    alike: float
    chance: float
    spread: float
    pairs: int

    @property
    def is_poor(self) -> bool:
        """Whether `alike` is above chance by more than the draw explains, and by enough to matter."""
        deviation = (self.chance * (1 - self.chance) / max(self.pairs, 1)) ** 0.5
        return self.alike - self.chance > max(NOTICEABLE * (1 - self.chance), 4 * deviation)

    def __str__(self) -> str:
        """Both in words, beside a full shuffle."""
        return (
            f"{self.alike:.1%} of mixup's pairs are of one class ({self.chance:.1%} in a full shuffle), and the number "
            f"of a class's images in a batch varies {max(self.spread, 0):.1f} times as much"
        )


def lane_order(config: DataConfig, store: Store, seed: int) -> LaneOrder:
    """The order that the settings ask for."""
    return LaneOrder(
        store.shard_sizes,
        seed=seed,
        lanes=config.lanes,
        batch_size=config.global_batch_size,
        window=config.window,
        repeats=config.repeats,
        block=config.block,
    )


def shuffle_quality(config: DataConfig, store: Store, seed: int) -> ShuffleQuality:
    """Measures some lanes of epoch 0, from the index alone; takes about as long as the order of these lanes itself."""
    order, counts = lane_order(config, store, seed), store.class_samples()
    alike = pairs = 0
    for lane in range(0, config.lanes, _stride(config.lanes, len(store))):
        labels = store.labels_of(order.lane(0, lane))
        alike, pairs = alike + int((labels[1:] == labels[:-1]).sum()), pairs + len(labels) - 1
    chance = float((counts * (counts - 1)).sum() / max(len(store) * (len(store) - 1), 1))
    measured = alike / pairs if pairs else chance
    excess = (measured - chance) / (1 - chance) if chance < 1 else 0.0
    return ShuffleQuality(measured, chance, 1 + (config.global_batch_size // config.lanes - 1) * excess, pairs)


def _stride(lanes: int, samples: int) -> int:
    """Each how-manieth lane to look at, so that these have `SAMPLES_MEASURED` of all samples."""
    return max(lanes // max(-(-lanes * SAMPLES_MEASURED // samples), 1), 1)


def shuffle_warning(config: DataConfig, store: Store, seed: int) -> str:
    """A line where the order mixes classes badly; empty where it doesn't."""
    if config.block == 1:
        return ""  # a full shuffle, whatever the shards are
    quality = shuffle_quality(config, store, seed)
    return f"shards sorted by class: {quality}: see data.block (docs/data.md)" if quality.is_poor else ""
