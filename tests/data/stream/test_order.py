"""The order of an epoch, as properties of any set of shards."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convneur.data.config import DataConfig
from convneur.data.keys import key, permutation, raw_bits
from convneur.data.stream.order import LaneOrder
from convneur.data.stream.shuffle import lane_order, shuffle_quality, shuffle_warning


@st.composite
def settings_of_orders(draw: st.DrawFn) -> dict[str, object]:
    """Shards of 0 to 40 samples, and a batch size that some epoch can fill."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    lanes = draw(st.integers(1, min(8, sum(sizes))))
    share = draw(st.integers(1, sum(sizes) // lanes))
    return {
        "shard_sizes": sizes,
        "seed": draw(st.integers(0, 2**32)),
        "lanes": lanes,
        "batch_size": lanes * share,
        "window": draw(st.integers(1, 5)),
        "repeats": draw(st.sampled_from([1, 1, 2, 3])),
        "block": draw(st.sampled_from([0, 0, 1, 3, 50])),
    }


class Arranged:
    """A store of nothing but labels, in shards of one size."""

    def __init__(self, labels: np.ndarray, shard: int):
        self.all_labels = labels
        self.shard_sizes = np.full(len(labels) // shard, shard)

    def __len__(self) -> int:
        return len(self.all_labels)

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        return self.all_labels[samples]

    def class_samples(self) -> np.ndarray:
        return np.bincount(self.all_labels)


def showings(order: LaneOrder, lanes: int) -> np.ndarray:
    """Which showing of its sample each is, in the shape of `epoch_of`."""
    steps = [np.tile(order.repetitions(step), (lanes, 1)) for step in range(order.steps_per_epoch)]
    return np.stack(steps)


def epoch_of(order: LaneOrder, epoch: int, lanes: range) -> np.ndarray:
    """(steps, len(lanes), B/L)"""
    return np.stack([order.samples(epoch, step, lanes) for step in range(order.steps_per_epoch)])


@settings(deadline=None)
@given(settings_of_orders(), st.integers(0, 1000))
def test_an_epoch_shows_no_sample_twice_and_fills_every_batch(arguments: dict, epoch: int) -> None:
    order = LaneOrder(**arguments)
    total, batch, lanes = sum(arguments["shard_sizes"]), arguments["batch_size"], arguments["lanes"]
    samples = epoch_of(order, epoch, range(lanes))
    assert samples.shape == (total // batch, lanes, batch // lanes)
    views = np.stack([samples.ravel(), showings(order, lanes).ravel()], axis=1)
    assert len(np.unique(views, axis=0)) == samples.size
    assert views[:, 1].max() < arguments["repeats"]
    assert len(np.unique(samples)) == lanes * -(-(samples.size // lanes) // arguments["repeats"])
    assert samples.min() >= 0
    assert samples.max() < total


@settings(deadline=None)
@given(settings_of_orders(), st.integers(0, 1000), st.data())
def test_lanes_read_one_by_one_in_any_order_give_the_same_step(
    arguments: dict, epoch: int, data: st.DataObject
) -> None:
    whole = epoch_of(LaneOrder(**arguments), epoch, range(arguments["lanes"]))
    lane = data.draw(st.integers(0, arguments["lanes"] - 1))
    step = data.draw(st.integers(0, len(whole) - 1))
    fresh = LaneOrder(**arguments)
    fresh.samples(epoch + 1, 0, range(arguments["lanes"]))  # another epoch before leaves no trace
    assert np.array_equal(fresh.samples(epoch, step, range(lane, lane + 1))[0], whole[step, lane])


@settings(max_examples=20, deadline=None)
@given(settings_of_orders())
def test_every_sample_is_seen_sooner_or_later(arguments: dict) -> None:
    order = LaneOrder(**arguments)
    lanes = range(arguments["lanes"])
    unseen = set(range(sum(arguments["shard_sizes"])))
    for epoch in range(500):
        unseen -= set(epoch_of(order, epoch, lanes).ravel().tolist())
        if not unseen:
            return
    pytest.fail(f"{unseen} not seen in 500 epochs")


def test_each_sample_is_left_out_equally_often() -> None:
    order = LaneOrder([30, 10, 60, 1], seed=3, lanes=4, batch_size=40, window=2)
    epochs = 2000
    seen = sum(np.bincount(epoch_of(order, epoch, range(4)).ravel(), minlength=101) for epoch in range(epochs))
    expected = epochs * 80 / 101
    deviation = np.sqrt(epochs * 80 / 101 * 21 / 101)
    assert np.abs(seen - expected).max() < 5 * deviation


@pytest.mark.parametrize(("repeats", "share"), [(2, 4), (3, 6), (3, 16), (4, 10)])
def test_mixup_never_meets_two_views_of_a_sample(repeats: int, share: int) -> None:
    order = LaneOrder([500], seed=0, lanes=2, batch_size=2 * share, window=2, repeats=repeats)
    samples = epoch_of(order, 0, range(2))
    assert (samples != samples[:, :, ::-1]).all()


def test_views_of_a_sample_share_a_step_or_two_in_a_row() -> None:
    order = LaneOrder([100] * 5, seed=0, lanes=4, batch_size=64, window=2, repeats=3)
    samples = epoch_of(order, 0, range(4))
    steps = {number: np.unique(np.argwhere(samples == number)[:, 0]) for number in np.unique(samples)}
    assert all(len(at) == 1 or (len(at) == 2 and at[1] == at[0] + 1) for at in steps.values())
    assert np.mean([len(at) for at in steps.values()]) < 1.2


def test_samples_travel_over_all_steps_and_lanes() -> None:
    order = LaneOrder([64] * 8, seed=0, lanes=4, batch_size=32, window=2)
    steps, lanes = [], []
    for epoch in range(400):
        step, lane, _ = np.argwhere(epoch_of(order, epoch, range(4)) == 100)[0]
        steps.append(step)
        lanes.append(lane)
    assert np.bincount(steps, minlength=16).min() > 5
    assert np.bincount(lanes, minlength=4).min() > 60


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        order = LaneOrder([100] * 5, seed=seed, lanes=5, batch_size=50, window=2)
        return order.samples(epoch, 0, range(5)).ravel().tolist()

    firsts = [first(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(firsts.count(one) == 1 for one in firsts)


def test_a_lane_reads_few_shards_at_a_time() -> None:
    window = 3
    order = LaneOrder([100] * 64, seed=0, lanes=4, batch_size=40, window=window)
    lane = epoch_of(order, 0, range(1)).ravel()  # 16 or 17 spans
    for begin in range(0, len(lane) - 100, 100):
        assert len(set(lane[begin : begin + 100] // 100)) <= 2 * window


def test_the_order_never_changes() -> None:
    order = LaneOrder([5, 3, 8, 1], seed=7, lanes=2, batch_size=4, window=2)
    assert epoch_of(order, 1, range(2)).tolist() == [
        [[3, 2], [11, 15]],
        [[0, 4], [13, 12]],
        [[1, 7], [10, 16]],
        [[9, 8], [14, 5]],
    ]
    in_blocks = LaneOrder([5, 3, 8, 1], seed=7, lanes=2, batch_size=4, window=1, block=2)
    assert epoch_of(in_blocks, 1, range(2)).tolist() == [
        [[1, 5], [12, 13]],
        [[0, 4], [8, 2]],
        [[14, 11], [6, 3]],
        [[15, 10], [7, 16]],
    ]
    assert key(np.int64(5), "x") == key(5, "x")


@pytest.mark.parametrize("shards", [[250] * 40, [10_000]], ids=["sorted shards", "one sorted shard"])
def test_blocks_mix_sorted_classes_as_a_full_shuffle_does(shards: list[int]) -> None:
    labels = np.arange(10_000) // 250  # 40 classes, one after the other
    settings = {"seed": 1, "lanes": 8, "batch_size": 128, "window": 4}

    def statistics(order: LaneOrder) -> tuple[float, float, float]:
        """Share of mixup pairs of one class, chi-squared over its degrees of freedom, correlation of next batches."""
        batches = [labels[epoch_of(order, epoch, range(8))] for epoch in range(3)]
        counts = np.stack([[np.bincount(step.ravel(), minlength=40) for step in epoch] for epoch in batches])
        pairs = np.mean([(epoch == epoch[:, :, ::-1]).mean() for epoch in batches])
        following = np.mean([np.corrcoef(*two)[0, 1] for epoch in counts for two in pairwise(epoch)])
        return float(pairs), float(((counts - 3.2) ** 2 / 3.2).sum(-1).mean() / 39), float(following)

    pairs, _, following = statistics(LaneOrder(shards, **settings))
    assert pairs > 0.1 or following > 0.3  # what is wrong without blocks
    for block, allowed in ((1, 0.0), (10, 0.01)):
        pairs, chi2, following = statistics(LaneOrder(shards, **settings, block=block))
        assert abs(pairs - 1 / 40) < 0.004 + allowed  # 15,000 pairs
        assert abs(chi2 - 1) < 0.1 + 10 * allowed
        assert abs(following) < 0.1 + 5 * allowed


def test_what_is_measured_of_a_shuffle_is_what_its_batches_show() -> None:
    generator = np.random.default_rng(0)
    labels = np.sort(generator.integers(0, 50, 20_000))
    for arrangement, block, poor in ((labels, 0, True), (labels, 1, False), (generator.permutation(labels), 0, False)):
        config = DataConfig(global_batch_size=256, lanes=16, window=4, block=block)
        store = Arranged(arrangement, 500)
        quality = shuffle_quality(config, store, seed=3)
        seen = arrangement[epoch_of(lane_order(config, store, 3), 0, range(16))]
        counts = np.stack([np.bincount(step.ravel(), minlength=50) for step in seen])
        assert quality.alike == pytest.approx((seen == seen[:, :, ::-1]).mean(), rel=0.15)
        if not poor:
            assert quality.spread == pytest.approx(1, abs=0.1)
            assert ((counts - 5.12) ** 2).mean() / 5.12 / 0.98 == pytest.approx(1, abs=0.2)
        assert quality.is_poor is poor
        assert bool(shuffle_warning(config, store, seed=3)) is poor


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for draw in range(2000):
        counts[np.arange(5), permutation(5, "test", draw)] += 1
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)
    assert raw_bits(3, "a").tolist() != raw_bits(3, "b").tolist()


def test_imagenet_is_reordered_in_a_moment() -> None:
    order = LaneOrder([1000] * 1281 + [167], seed=0, lanes=64, batch_size=4096, window=8)
    start = time.process_time()
    batch = order.samples(300, 100, range(64))
    assert time.process_time() - start < 1
    assert len(np.unique(batch // 1000)) > 300  # a batch mixes shards


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 30},
        {"batch_size": 101},
        {"batch_size": 0},
        {"lanes": 0},
        {"window": 0},
        {"repeats": 0},
        {"block": -1},
    ],
)
def test_contradictions_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no order of 100 samples"):
        LaneOrder([60, 40], **{"seed": 0, "lanes": 4, "batch_size": 20, "window": 2, **wrong})


def test_steps_outside_an_epoch_are_refused() -> None:
    order = LaneOrder([10], seed=0, lanes=1, batch_size=3, window=1)
    for step in (-1, 3):
        with pytest.raises(IndexError):
            order.samples(0, step, range(1))
