"""Whether the intervals of scaling laws hold what they promise: coverage over draws of known laws with noise.

    python benchmarks/scaling_law.py
    python benchmarks/scaling_law.py --points data/svg_extracted_data.csv

The second fits the joint law to the runs of arXiv 2203.15556, as arXiv 2404.10102 has read them off its figure; their
table is in github.com/epoch-research/analyzing-chinchilla. What they have found themselves, without the five runs of
the fewest tokens a parameter: E 1.8172, exponents 0.3478 and 0.3658.
"""

import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import command_line

from convneur.studies.scaling_law import Law, bootstrap

LEVEL = 0.95
SEEDS = 3
SIZES = np.geomspace(1e5, 1e7, 7)
LENGTHS = np.geomspace(1e6, 3e7, 4)
FLOORS = (0.2, 1.0)
RATIO = 8  # between the largest noise and the smallest
Noise = Callable[[np.random.Generator, np.ndarray], np.ndarray]  # of runs at places 0, the smallest size, to 1
OUTLIERS = 5  # of the published runs


def normal(generator: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """2 % between runs."""
    return generator.normal(0, 0.02, len(places))


def rising(generator: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """0.5 % of the smallest size, 4 % of the largest."""
    return generator.normal(0, 0.04 / RATIO * RATIO**places)


def falling(generator: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """4 % of the smallest size, 0.5 % of the largest."""
    return generator.normal(0, 0.04 * RATIO**-places)


def jumping(generator: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """1 %, but 4 % of the two largest sizes in seven: no power of the size."""
    return generator.normal(0, np.where(places > 0.8, 0.04, 0.01))


def heavy(generator: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """1.5 %, and now and then far more: Student's t of 3 degrees."""
    return 0.015 * generator.standard_t(3, len(places))


def outliers(generator: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """2 %, and a run in twenty that ended a fifth too high."""
    return normal(generator, places) + 0.2 * (generator.random(len(places)) < 0.05)


def coverage(
    design: np.ndarray, noise: Noise, floors: tuple[float, float], draws: int, replicates: int
) -> dict[str, tuple[int, float]]:
    """How many of `draws` laws lie within their intervals, and the median relative width of those, by quantity.

    design: (n, k), what every run's size and length is; floors: between which E is drawn.
    """
    held: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    places = np.log(design[:, 0] / SIZES[0]) / np.log(SIZES[-1] / SIZES[0])
    beyond = 10 * design.max(axis=0)[None]  # ten times as large, and as long, as any run
    for draw in range(draws):
        generator = np.random.default_rng(draw)
        exponents = generator.uniform(0.25, 0.6, design.shape[1])
        center = np.exp(np.log(design).mean(axis=0))
        floor, scaled = generator.uniform(*floors), generator.uniform(0.3, 1.0, design.shape[1])
        law = Law(floor, tuple(scaled * center**exponents), tuple(exponents))
        loss = law(design) * np.exp(noise(generator, places))
        fit = bootstrap(design, loss, level=LEVEL, replicates=replicates, seed=draw)
        runs = law(beyond)[0] * np.exp(noise(generator, np.ones(SEEDS))).mean()
        checks = {
            "floor E": (fit.floor, law.floor),
            **{f"exponent {k + 1}": (fit.exponent(k), exponents[k]) for k in range(design.shape[1])},
            "law at 10 x": (fit.predict(beyond)[0], law(beyond)[0]),
            f"mean of {SEEDS} runs at 10 x": (fit.predict(beyond, runs=SEEDS)[0], runs),
        }
        for name, (interval, truth) in checks.items():
            held.setdefault(name, []).append(interval.holds(truth))
            widths.setdefault(name, []).append((interval.high - interval.low) / truth if truth else np.nan)
    return {name: (sum(held[name]), float(np.median(widths[name]))) for name in held}


def fit_published(path: Path) -> None:
    """Fits the joint law to a table of published runs, and prints it."""
    with path.open() as file:
        table = [
            {key: float(row[key]) for key in ("Model Size", "Training FLOP", "loss")} for row in csv.DictReader(file)
        ]
    size, flop, loss = np.array([list(row.values()) for row in table]).T
    images = flop / (6 * size)
    kept = np.argsort(images / size)[OUTLIERS:]
    fit = bootstrap(np.column_stack([size, images])[kept], loss[kept], delta=1e-3, replicates=200)
    print(f"{len(kept)} runs: A {fit.law.coefficients[0]:.4g}, B {fit.law.coefficients[1]:.4g}")
    for name, interval in (("E", fit.floor), ("alpha", fit.exponent(0)), ("beta", fit.exponent(1))):
        print(f"{name:6} {interval.value:.4f}, {fit.level:.0%} interval {interval.low:.4f} to {interval.high:.4f}")


def main() -> None:
    """Prints the table."""
    parser = command_line(__doc__)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--points", type=Path, help="table of published runs to fit instead")
    args = parser.parse_args()
    if args.points:
        fit_published(args.points)
        return
    started = time.process_time()
    single = np.repeat(SIZES, SEEDS)[:, None]
    few = np.geomspace(1e5, 1e7, 5)[:, None]  # each run once
    twice = np.repeat(few, 2, axis=0)
    joint = np.array([(size, images) for size in SIZES for images in LENGTHS])
    designs = (
        ("7 sizes, 3 seeds, normal noise", single, normal, FLOORS, args.replicates),
        ("7 sizes, 3 seeds, rising noise", single, rising, FLOORS, args.replicates),
        ("7 sizes, 3 seeds, falling noise", single, falling, FLOORS, args.replicates),
        ("7 sizes, 3 seeds, jumping noise", single, jumping, FLOORS, args.replicates),
        ("7 sizes, 3 seeds, heavy tails", single, heavy, FLOORS, args.replicates),
        ("7 sizes, 3 seeds, outliers", single, outliers, FLOORS, args.replicates),
        ("7 sizes, 3 seeds, no floor", single, normal, (0.0, 0.0), args.replicates),
        ("5 sizes, 1 seed, normal noise", few, normal, FLOORS, args.replicates),
        ("5 sizes, 1 seed, rising noise", few, rising, FLOORS, args.replicates),
        ("5 sizes, 1 seed, falling noise", few, falling, FLOORS, args.replicates),
        ("5 sizes, 2 seeds, rising noise", twice, rising, FLOORS, args.replicates),
        ("5 sizes, 2 seeds, falling noise", twice, falling, FLOORS, args.replicates),
        ("7 sizes x 4 lengths, joint law", joint, normal, FLOORS, args.replicates // 2),
        ("7 sizes x 4 lengths, rising noise", joint, rising, FLOORS, args.replicates // 2),
        ("7 sizes x 4 lengths, falling noise", joint, falling, FLOORS, args.replicates // 2),
    )
    print(f"intervals of {LEVEL:.0%}, {args.draws} draws")
    print("| runs | quantity | laws within | of the draws | median width of the interval |\n|---|---|---:|---:|---:|")
    for name, design, noise, floors, replicates in designs:
        for quantity, (held, width) in coverage(design, noise, floors, args.draws, replicates).items():
            wide = "" if np.isnan(width) else f"{width:.1%} of it"
            print(f"| {name} | {quantity} | {held} | {held / args.draws:.1%} | {wide} |", flush=True)
    print(f"{time.process_time() - started:.0f} s of CPU time")


if __name__ == "__main__":
    main()
