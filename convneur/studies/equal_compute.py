"""Models at equal compute: losses of different sizes (IsoFLOP curves), and one kind of model against another.

A curve maps compute to the losses of the runs that spent it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from convneur.studies.scaling_law import Interval

Curve = Mapping[float, Sequence[float]]


@dataclass(frozen=True)
class IsoFlop:
    """Losses of different sizes at one compute budget, interpolated along each size's runs.

    Attributes:
        budget: compute, in the units of the curves.
        sizes: parameters, (m,).
        losses: (m,).
        best_size: where a parabola in log size is lowest; None where that is not between two measured sizes, so that
            the minimum lies at the boundary or beyond it.
    """

    budget: float
    sizes: tuple[float, ...]
    losses: tuple[float, ...]
    best_size: float | None


def isoflops(curves: Mapping[float, Curve], count: int = 5) -> list[IsoFlop]:
    """IsoFLOP curves at `count` budgets, from the runs of each size; at least three sizes have to reach a budget.

    A budget is reached by a size that was trained both shorter and longer, or exactly so long.
    """
    ranges = [(min(curve), max(curve)) for curve in curves.values() if len(curve) > 1]
    if len(ranges) < 3:
        return []
    lows, highs = np.sort([low for low, _ in ranges]), np.sort([high for _, high in ranges])
    found = []
    for budget in np.geomspace(lows[2], highs[-3], count) if lows[2] < highs[-3] else ():
        reached = {
            size: float(np.exp(_interpolated(curve, budget)[0]))
            for size, curve in sorted(curves.items())
            if len(curve) > 1 and min(curve) <= budget <= max(curve)
        }
        if len(reached) >= 3:
            sizes, losses = np.array(list(reached)), np.array(list(reached.values()))
            found.append(IsoFlop(float(budget), tuple(sizes.tolist()), tuple(losses.tolist()), _lowest(sizes, losses)))
    return found


def _lowest(sizes: np.ndarray, losses: np.ndarray) -> float | None:
    at = int(np.argmin(losses))
    if at in (0, len(losses) - 1):
        return None
    square, slope, _ = np.polyfit(np.log(sizes), losses, 2)
    if square <= 0:
        return None
    best = math.exp(-slope / (2 * square))
    return best if sizes[0] < best < sizes[-1] else None


@dataclass(frozen=True)
class Difference:
    """Loss of one kind of model minus that of another at a compute budget.

    Attributes:
        budget: compute, in the units of the curves.
        first: loss of the first kind.
        second: loss of the second.
        difference: first - second, with its interval; None of the latter where no point was run twice.
    """

    budget: float
    first: float
    second: float
    difference: float
    interval: Interval | None


def differences(first: Curve, second: Curve, level: float = 0.95) -> list[Difference]:
    """The first curve against the second at every budget that was run of either and both of them span.

    Losses are interpolated in log between neighbouring points. The interval is Student's, from the spread of log loss
    between runs of the same point, pooled over all points of both curves.
    """
    if not first or not second:
        return []
    low, high = max(min(first), min(second)), min(max(first), max(second))
    groups = [np.log(losses) for curve in (first, second) for losses in curve.values()]
    freedom = sum(len(group) - 1 for group in groups)
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom if freedom else None
    found = []
    for budget in sorted(budget for budget in {*first, *second} if low <= budget <= high):
        (a, a_weight), (b, b_weight) = _interpolated(first, budget), _interpolated(second, budget)
        loss_a, loss_b = math.exp(a), math.exp(b)
        interval = None
        if variance is not None:
            error = math.sqrt(variance * (loss_a**2 * a_weight + loss_b**2 * b_weight))
            half = float(t.ppf((1 + level) / 2, freedom)) * error
            interval = Interval(loss_a - loss_b, loss_a - loss_b - half, loss_a - loss_b + half)
        found.append(Difference(float(budget), loss_a, loss_b, loss_a - loss_b, interval))
    return found


def _interpolated(curve: Curve, budget: float) -> tuple[float, float]:
    """Mean log loss at a budget, linear in log compute, and its variance in units of a single run's."""
    budgets = np.array(sorted(curve))
    means = np.array([np.log(curve[b]).mean() for b in budgets])
    above = int(np.clip(np.searchsorted(budgets, budget), 0, len(budgets) - 1))
    if budgets[above] == budget or len(budgets) == 1:
        return float(means[above]), 1 / len(curve[budgets[above]])
    below = above - 1
    share = math.log(budget / budgets[below]) / math.log(budgets[above] / budgets[below])
    counts = [len(curve[budgets[i]]) for i in (below, above)]
    value = (1 - share) * means[below] + share * means[above]
    return float(value), (1 - share) ** 2 / counts[0] + share**2 / counts[1]
