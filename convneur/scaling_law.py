"""Saturating power laws fitted to runs, with intervals that are computed or absent.

L(x) = E + sum_k A_k x_k^-alpha_k, with one term (parameters N, operations, or images D) or two (N and D, the joint law
of arXiv 2203.15556). Residuals are r = log L_measured - log L(x), their cost is Huber's, as there and in the ladder of
OLMo (arXiv 2412.04403). What made the published intervals of that law implausible (arXiv 2404.10102) was an optimizer
that stopped early and rounded results; hence a sum, no mean, exact derivatives, many starts and full precision.
That a law needs its floor E, and must be judged by what it predicts outside its range: arXiv 2305.13035, 2106.04560.

Legend: n runs, k terms, p = 1 + 2 k parameters, R replicates of the bootstrap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.stats import norm, t

FEWEST_SIZES = 5
SHORTEST_RANGE = 10.0  # largest over smallest size: a decade
FEWEST_LENGTHS = 3  # different numbers of images that a joint law needs
SMALLEST_DELTA = 1e-3  # Huber's threshold in arXiv 2203.15556
EXPONENTS = np.geomspace(0.03, 3.0, 14)
STARTS = 4
SMALLEST_FLOOR = 1e-6  # of the smallest loss; a fit can't tell a lower floor from none
LARGEST_EXPONENT = 10.0  # where noise makes a step of the law, its exponent would grow without end


class RefusedError(ValueError):
    """The runs can't carry a fit; the message is one line that says why."""


@dataclass(frozen=True)
class Law:
    """L(x) = floor + sum_k coefficients[k] x_k^-exponents[k]."""

    floor: float
    coefficients: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(n, k) -> (n,)."""
        terms = np.asarray(self.coefficients) * np.asarray(x, float) ** -np.asarray(self.exponents)
        total: np.ndarray = self.floor + terms.sum(axis=1)
        return total


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the value lies within."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs.

    Attributes:
        law: the fit itself.
        replicates: the same fitted to R resampled sets of runs.
        residuals: log of measured over fitted losses, (n,).
        drawn: residuals as the bootstrap draws them, (n,): centred, and widened for the p parameters spent.
        level: of the intervals.
    """

    law: Law
    replicates: tuple[Law, ...]
    residuals: np.ndarray
    drawn: np.ndarray
    level: float

    @property
    def floor(self) -> Interval:
        """E."""
        return self._interval(self.law.floor, [law.floor for law in self.replicates])

    def exponent(self, term: int = 0) -> Interval:
        """alpha of a term."""
        return self._interval(self.law.exponents[term], [law.exponents[term] for law in self.replicates])

    def predict(self, x: np.ndarray, runs: int = 0, seed: int = 0) -> list[Interval]:
        """The law at x (n, k): intervals of the law itself, or of the mean of as many new runs as asked for."""
        values = np.stack([law(x) for law in self.replicates])
        if runs:
            noise = np.random.default_rng(seed).choice(self.drawn, (runs, *values.shape))
            values = values * np.exp(noise).mean(axis=0)
        return [self._interval(value, column) for value, column in zip(self.law(x), values.T, strict=True)]

    def _interval(self, value: float, replicates: Sequence[float] | np.ndarray) -> Interval:
        tail = (1 - self.level) / 2
        low, high = np.quantile(replicates, [tail, 1 - tail])
        return Interval(float(value), float(low), float(high))


def check_range(sizes: Sequence[float] | np.ndarray, what: str = "parameters") -> None:
    """Raises RefusedError for fewer than 5 different sizes, or less than a decade between them."""
    different = np.unique(np.asarray(sizes, float))
    if len(different) < FEWEST_SIZES:
        raise RefusedError(f"{len(different)} different numbers of {what}, expected at least {FEWEST_SIZES}")
    ratio = different[-1] / different[0]
    if ratio < SHORTEST_RANGE:
        raise RefusedError(f"{what} range over a factor of {ratio:.3g}, expected at least {SHORTEST_RANGE:g}, a decade")


def check_falls(x: np.ndarray, loss: np.ndarray, axes: Sequence[str]) -> None:
    """Raises RefusedError where losses (n,) don't fall along each of the axes (n, k) by more than chance explains.

    One-sided t-tests, at 5 %, of the slopes of a plane through the logarithms.
    """
    _check_values(x, loss)
    columns = np.column_stack([np.ones(len(loss)), np.log(x / np.exp(np.log(x).mean(axis=0)))])
    inverse = np.linalg.pinv(columns.T @ columns)
    plane = inverse @ columns.T @ np.log(loss)
    freedom = len(loss) - len(plane)
    errors = np.sqrt(np.diag(inverse) * ((np.log(loss) - columns @ plane) ** 2).sum() / freedom)
    for axis, slope, error in zip(axes, plane[1:], errors[1:], strict=True):
        if not slope + t.ppf(0.95, freedom) * error < 0:
            raise RefusedError(f"it doesn't fall with {axis} by more than the noise between runs")


def fit_law(x: np.ndarray, loss: np.ndarray, delta: float | None = None) -> Law:
    """Fits a law to x (n, k) and losses (n,) by multi-start least squares of Huber's cost in log.

    delta: Huber's threshold; None for 1.345 robust standard deviations of the residuals, at which the estimate keeps
    95 % of the efficiency of least squares if the noise is normal.

    For given exponents the other parameters enter linearly, so non-negative least squares gives them: this variable
    projection over a grid of exponents finds the starts, and the best of them are refined in all p parameters.

    Raises RefusedError where there are no more runs than parameters, or a value has no logarithm.
    """
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    _check_values(x, loss)
    center = np.exp(np.log(x).mean(axis=0))
    if delta is None:
        first = _best(x / center, loss, 10 * SMALLEST_DELTA, _starts(x / center, loss, STARTS))
        delta = _delta(_residuals(first, np.log(x / center), loss), first.size)
    return _law(_best(x / center, loss, delta, _starts(x / center, loss, STARTS)), center, loss)


def bootstrap(
    x: np.ndarray,
    loss: np.ndarray,
    *,
    level: float = 0.95,
    replicates: int = 400,
    seed: int = 0,
    delta: float | None = None,
) -> Fit:
    """Fits a law, and its intervals by a bootstrap over runs; see `fit_law` for what it takes and raises.

    Every run of a replicate is given the residual of a run drawn at random, so the design, sizes and seeds, stays what
    it is. Residuals of few runs are too small, by sqrt((n - p) / n), and their quantiles too near, by Student's t over
    the normal; both are made good (arXiv 1411.5279, section 4.5, does so by expanding the percentiles). The intervals
    answer for the noise between runs, not for the law being the wrong one.
    """
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    law = fit_law(x, loss, delta)
    fitted = law(x)
    residuals = np.log(loss) - np.log(fitted)
    runs, parameters = len(loss), 1 + 2 * x.shape[1]
    quantile = (1 + level) / 2
    wider = math.sqrt(runs / (runs - parameters)) * t.ppf(quantile, runs - parameters) / norm.ppf(quantile)
    drawn = (residuals - residuals.mean()) * wider
    if delta is None:
        delta = _delta(residuals, parameters)
    center = np.exp(np.log(x).mean(axis=0))
    start = _theta(law, center)
    generator = np.random.default_rng(seed)
    laws = []
    for _ in range(replicates):
        again = fitted * np.exp(generator.choice(drawn, runs))
        starts = [start, *_starts(x / center, again, 1)]
        laws.append(_law(_best(x / center, again, delta, starts), center, again))
    return Fit(law, tuple(laws), residuals, drawn, level)


def _check_values(x: np.ndarray, loss: np.ndarray) -> None:
    parameters = 1 + 2 * x.shape[1]
    if len(loss) <= parameters:
        raise RefusedError(f"{len(loss)} runs for a law of {parameters} parameters, expected at least {parameters + 1}")
    if not (np.isfinite(loss).all() and np.isfinite(x).all() and loss.min() > 0 and x.min() > 0):
        raise RefusedError("a value is 0 or not finite and has no logarithm")


# theta = (log E, log A_1..k, log alpha_1..k), with x divided by its geometric mean, so that A is of the size of L.


def _theta(law: Law, center: np.ndarray) -> np.ndarray:
    exponents = np.asarray(law.exponents)
    scaled = np.asarray(law.coefficients) * center**-exponents
    tiny = 1e-12
    return np.log(np.maximum([law.floor, *scaled, *exponents], tiny))


def _law(theta: np.ndarray, center: np.ndarray, loss: np.ndarray) -> Law:
    terms = len(center)
    exponents = _exponents(theta, terms)
    coefficients = np.exp(theta[1 : 1 + terms]) * center**exponents
    floor = float(np.exp(theta[0]))
    if floor < SMALLEST_FLOOR * loss.min():
        floor = 0.0
    return Law(floor, tuple(map(float, coefficients)), tuple(map(float, exponents)))


def _exponents(theta: np.ndarray, terms: int) -> np.ndarray:
    exponents: np.ndarray = np.exp(np.minimum(theta[1 + terms :], math.log(LARGEST_EXPONENT)))
    return exponents


def _log_terms(theta: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """log of E and of each A x^-alpha, (n, 1 + k)."""
    terms = log_x.shape[1]
    powers = theta[1 : 1 + terms] - _exponents(theta, terms) * log_x
    return np.column_stack([np.full(len(log_x), theta[0]), powers])


def _residuals(theta: np.ndarray, log_x: np.ndarray, loss: np.ndarray) -> np.ndarray:
    difference: np.ndarray = np.log(loss) - np.logaddexp.reduce(_log_terms(theta, log_x), axis=1)
    return difference


def _delta(residuals: np.ndarray, parameters: int) -> float:
    spread = 1.4826 * np.median(np.abs(residuals - np.median(residuals)))
    freedom = math.sqrt(len(residuals) / (len(residuals) - parameters))
    return max(float(1.345 * spread * freedom), SMALLEST_DELTA)


def _starts(x: np.ndarray, loss: np.ndarray, count: int) -> list[np.ndarray]:
    """The best of a grid of exponents, with the E and A that non-negative least squares of r ~ L(x)/L - 1 gives."""
    terms = x.shape[1]
    found = []
    for exponents in product(EXPONENTS[::terms], repeat=terms):
        columns = np.column_stack([np.ones(len(loss)), x ** -np.array(exponents)]) / loss[:, None]
        linear, error = nnls(columns, np.ones(len(loss)))
        found.append((error, np.concatenate([linear, exponents])))
    found.sort(key=lambda pair: pair[0])
    smallest = 1e-3 * loss.min()
    starts = []
    for _, values in found[:count]:
        values[: 1 + terms] = np.maximum(values[: 1 + terms], smallest)
        starts.append(np.log(values))
    return starts


def _best(x: np.ndarray, loss: np.ndarray, delta: float, starts: Sequence[np.ndarray]) -> np.ndarray:
    """The best theta that Levenberg and Marquardt's method reaches from the starts.

    Huber's cost rho(r) becomes a sum of squares of z = sign(r) sqrt(2 rho(r)).
    """
    log_x = np.log(x)
    terms = x.shape[1]

    def squares(theta: np.ndarray) -> np.ndarray:
        r = _residuals(theta, log_x, loss)
        size = np.abs(r)
        outer = np.sqrt(np.maximum(2 * delta * size - delta**2, delta**2))
        return np.where(size <= delta, r, np.sign(r) * outer)

    def derivatives(theta: np.ndarray) -> np.ndarray:
        log_terms = _log_terms(theta, log_x)
        total = np.logaddexp.reduce(log_terms, axis=1)
        size = np.abs(np.log(loss) - total)
        slope = np.where(size <= delta, 1.0, delta / np.sqrt(np.maximum(2 * delta * size - delta**2, delta**2)))
        shares = np.exp(log_terms - total[:, None])  # d log L / d log term
        inner = -shares[:, 1:] * _exponents(theta, terms) * log_x
        jacobian: np.ndarray = -slope[:, None] * np.column_stack([shares, inner])
        return jacobian

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        results = [least_squares(squares, start, derivatives, method="lm", max_nfev=200) for start in starts]
    best: np.ndarray = min(results, key=lambda result: result.cost).x
    return best


# Comparisons at equal compute. A curve maps compute to the losses of the runs that spent it.

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
