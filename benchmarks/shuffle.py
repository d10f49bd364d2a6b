"""How well the order of an epoch mixes classes, beside a full shuffle: python benchmarks/shuffle.py [--samples N]

Counts the batches themselves; `convneur data show` estimates the first and last column from a few lanes. Columns:

- pairs: of mixup's pairs, the share that is of one class
- chi2/df: of a batch's numbers of each class; 1 in a full shuffle
- next: correlation of the numbers of one batch with those of the next
- places: spans that the lanes read from at a time, shards or blocks
- order MB, s: memory of the order's own tables beside the lanes, and time to lay out an epoch
"""

import time

import numpy as np
from common import command_line

from convneur.data.stream.order import LaneOrder

CLASSES = 1000
STEPS = 40


def measure(batches: list[np.ndarray]) -> tuple[float, float, float]:
    """Statistics of pairs of successive batches' labels, each (lanes, share)."""
    counts = [np.bincount(labels.ravel(), minlength=CLASSES).astype(float) for labels in batches]
    expected = batches[0].size / CLASSES
    pairs = np.mean([(labels == labels[:, ::-1])[:, : labels.shape[1] // 2].mean() for labels in batches])
    chi2 = np.mean([((count - expected) ** 2 / expected).sum() / (CLASSES - 1) for count in counts])
    following = np.mean([np.corrcoef(*two)[0, 1] for two in zip(counts[::2], counts[1::2], strict=True)])
    return float(pairs), float(chi2), float(following)


def main() -> None:
    """Measures orders of sorted and of mixed shards, and prints a line for each."""
    parser = command_line(__doc__)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lanes", type=int, default=64)
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    mixed = generator.integers(0, CLASSES, args.samples)
    shards = [1000] * (args.samples // 1000) + [args.samples % 1000]
    steps = np.linspace(0, args.samples // args.batch_size - 2, STEPS).astype(int)

    print(f"{'':38} pairs  chi2/df    next  places  order MB     s")
    shuffled = generator.permutation(mixed)[: args.samples // args.batch_size * args.batch_size]
    shuffled = shuffled.reshape(-1, args.lanes, args.batch_size // args.lanes)
    full = measure([shuffled[step + more] for step in steps for more in (0, 1)])
    print(f"{'full shuffle':36} {full[0]:7.3%} {full[1]:8.2f} {full[2]:7.3f}")
    for name, labels, sizes, window, block in (
        ("mixed shards, window 8", mixed, shards, 8, 0),
        ("sorted, window 8", np.sort(mixed), shards, 8, 0),
        ("sorted, window 32", np.sort(mixed), shards, 32, 0),
        ("sorted, window 8, block 64", np.sort(mixed), shards, 8, 64),
        ("sorted, window 8, block 16", np.sort(mixed), shards, 8, 16),
        ("sorted, window 8, block 4", np.sort(mixed), shards, 8, 4),
        ("sorted, window 8, block 1", np.sort(mixed), shards, 8, 1),
        ("sorted, one shard, window 8", np.sort(mixed), [args.samples], 8, 0),
        ("sorted, one shard, window 8, block 1", np.sort(mixed), [args.samples], 8, 1),
    ):
        order = LaneOrder(sizes, seed=0, lanes=args.lanes, batch_size=args.batch_size, window=window, block=block)
        start = time.process_time()
        batches = [labels[order.samples(0, step + more, range(args.lanes))] for step in steps for more in (0, 1)]
        seconds = time.process_time() - start
        blocks = -(-args.samples // block) if block else len(sizes)
        places = min(args.lanes * (round(window * args.samples / len(sizes) / block) if block else window), blocks)
        pairs, chi2, following = measure(batches)
        megabytes = blocks * 4 * 8 / 1e6
        print(f"{name:36} {pairs:7.3%} {chi2:8.2f} {following:7.3f} {places:7,} {megabytes:9.1f} {seconds:5.2f}")


if __name__ == "__main__":
    main()
