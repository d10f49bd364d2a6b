"""Saturating power laws fitted to runs, with intervals that are computed or absent.

L(x) = E + sum_k A_k x_k^-alpha_k, with one term (parameters N, operations, or images D) or two (N and D, the joint law
of arXiv 2203.15556). Residuals are r = log L_measured - log L(x), their cost is Huber's, as there and in the ladder of
OLMo (arXiv 2412.04403). What made the published intervals of that law implausible (arXiv 2404.10102) was an optimizer
that stopped early and rounded results; hence a sum, no mean, exact derivatives, many starts and full precision.
That a law needs its floor E, and must be judged by what it predicts outside its range: arXiv 2305.13035, 2106.04560.
Runs count by the spread of the noise at their size (noise.py), and the intervals draw noise of that spread.

Legend: n runs, k terms, p = 1 + 2 k parameters, R replicates of the bootstrap, s the spread of the noise at a run's
size, in units of that at the middle of the sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.stats import norm, t

from convneur.studies.noise import Places, estimate_slopes

FEWEST_SIZES = 5
SHORTEST_RANGE = 10.0  # largest over smallest size: a decade
FEWEST_LENGTHS = 3  # different numbers of images that a joint law needs
SMALLEST_DELTA = 1e-3  # Huber's threshold in arXiv 2203.15556
EXPONENTS = np.geomspace(0.03, 3.0, 14)
STARTS = 4
SPREAD_TURNS = 2
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
        drawn: residuals / s as the bootstrap draws them, (n,): centred, and widened for the parameters spent.
        places: of sizes, for their s.
        slopes: of log s, (R, k), as each replicate has drawn them.
        level: of the intervals.
    """

    law: Law
    replicates: tuple[Law, ...]
    residuals: np.ndarray
    drawn: np.ndarray
    places: Places
    slopes: np.ndarray
    level: float

    @property
    def floor(self) -> Interval:
        """E."""
        return self._interval(self.law.floor, [law.floor for law in self.replicates])

    def exponent(self, term: int = 0) -> Interval:
        """alpha of a term."""
        return self._interval(self.law.exponents[term], [law.exponents[term] for law in self.replicates])

    def predict(self, x: np.ndarray, runs: int = 0, seed: int = 0) -> list[Interval]:
        """The law at x (n, k): intervals of the law itself, or of the mean of as many new runs as asked for.

        Beyond the sizes that were run, new runs are taken to be as noisy as those at the end.
        """
        values = np.stack([law(x) for law in self.replicates])
        if runs:
            spread = np.exp(self.slopes @ self.places.of(x).T)  # (R, n)
            noise = spread * np.random.default_rng(seed).choice(self.drawn, (runs, *values.shape))
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

    delta: Huber's threshold, where all runs are to count alike. With None they count by 1/s, and the threshold is 1.345
    robust standard deviations of what r / s leaves, at which the estimate keeps 95 % of the efficiency of least squares
    if the noise is normal.

    For given exponents the other parameters enter linearly, so non-negative least squares gives them: this variable
    projection over a grid of exponents finds the starts, and the best of them are refined in all p parameters.

    Raises RefusedError where there are no more runs than parameters, or a value has no logarithm.
    """
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    return _weighted(x, loss, delta).law


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

    Every run of a replicate is given r / s of a run drawn at random, times the s of its own size, so the design, sizes
    and seeds, stays what it is. How s changes with the size is uncertain, too: each replicate draws it anew.

    Residuals of few runs are too small, and their quantiles too near, by Student's t over the normal; both are made
    good (arXiv 1411.5279, section 4.5, does so by expanding the percentiles). They grow by n over the degrees of
    freedom, as in the jackknife's estimate of variance (HC3: MacKinnon and White, 1985); its root was too little in
    draws of known laws. The intervals answer for the noise between runs, and for its spread as a power of the size; not
    for the law being the wrong one.
    """
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    fit = _weighted(x, loss, delta)
    fitted = fit.law(x)
    residuals = np.log(loss) - np.log(fitted)
    runs, terms = x.shape
    freedom = runs - _parameters(terms)
    quantile = (1 + level) / 2
    wider = runs / (freedom - terms if freedom - terms > 1 else freedom) * t.ppf(quantile, freedom) / norm.ppf(quantile)
    scaled = residuals / fit.spread
    drawn = (scaled - scaled.mean()) * wider
    center = np.exp(np.log(x).mean(axis=0))
    start = _theta(fit.law, center)
    generator = np.random.default_rng(seed)
    slopes = generator.multivariate_normal(fit.slopes, fit.covariance, replicates)
    laws = []
    for noise_slopes in slopes:
        spread = np.exp(fit.places.of(x) @ noise_slopes)
        again = fitted * np.exp(generator.choice(drawn, runs) * spread)
        starts = [start, *_starts(x / center, again, 1)]
        laws.append(_law(_best(x / center, again, fit.delta, starts, fit.spread), center, again))
    return Fit(fit.law, tuple(laws), residuals, drawn, fit.places, slopes, level)


@dataclass(frozen=True)
class _Weighted:
    """A law with what it was fitted by: s (n,), its slopes (k,) and their covariance (k, k), and Huber's threshold."""

    law: Law
    places: Places
    spread: np.ndarray
    slopes: np.ndarray
    covariance: np.ndarray
    delta: float


def _weighted(x: np.ndarray, loss: np.ndarray, delta: float | None) -> _Weighted:
    """Fits the law and, unless a threshold is given, the spread of the noise, which want each other, in turns."""
    _check_values(x, loss)
    center = np.exp(np.log(x).mean(axis=0))
    scaled, terms = x / center, x.shape[1]
    places, spread = Places(x), np.ones(len(loss))
    slopes, covariance = np.zeros(terms), np.zeros((terms, terms))
    starts = _starts(scaled, loss, STARTS)
    if delta is not None:
        theta = _best(scaled, loss, delta, starts, spread)
        return _Weighted(_law(theta, center, loss), places, spread, slopes, covariance, delta)
    theta = _best(scaled, loss, 10 * SMALLEST_DELTA, starts, spread)
    for _ in range(SPREAD_TURNS):
        residuals = _residuals(theta, np.log(scaled), loss)
        leverage = _leverage(theta, np.log(scaled), spread)
        slopes, covariance = estimate_slopes(places.of(x), residuals, leverage)
        spread = np.exp(places.of(x) @ slopes)
        delta = _delta(residuals / spread, _parameters(terms))
        theta = _best(scaled, loss, delta, [theta, *starts], spread)
    assert delta is not None
    return _Weighted(_law(theta, center, loss), places, spread, slopes, covariance, delta)


def _parameters(terms: int) -> int:
    return 1 + 2 * terms


def _check_values(x: np.ndarray, loss: np.ndarray) -> None:
    parameters = _parameters(x.shape[1])
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


def _derivatives(theta: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """Of log L(x) by theta, (n, p)."""
    log_terms = _log_terms(theta, log_x)
    shares = np.exp(log_terms - np.logaddexp.reduce(log_terms, axis=1)[:, None])  # d log L / d log term
    return np.column_stack([shares, -shares[:, 1:] * _exponents(theta, log_x.shape[1]) * log_x])


def _leverage(theta: np.ndarray, log_x: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """How much of a run's own noise the weighted fit follows, (n,), 0 to nearly 1."""
    directions = np.linalg.svd(_derivatives(theta, log_x) / spread[:, None], full_matrices=False)[0]
    leverage: np.ndarray = np.minimum((directions**2).sum(axis=1), 0.99)
    return leverage


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


def _best(
    x: np.ndarray, loss: np.ndarray, delta: float, starts: Sequence[np.ndarray], spread: np.ndarray
) -> np.ndarray:
    """The best theta that Levenberg and Marquardt's method reaches from the starts.

    Huber's cost rho(r / s) becomes a sum of squares of z = sign(r) sqrt(2 rho(r / s)).
    """
    log_x = np.log(x)

    def squares(theta: np.ndarray) -> np.ndarray:
        r = _residuals(theta, log_x, loss) / spread
        size = np.abs(r)
        outer = np.sqrt(np.maximum(2 * delta * size - delta**2, delta**2))
        return np.where(size <= delta, r, np.sign(r) * outer)

    def derivatives(theta: np.ndarray) -> np.ndarray:
        size = np.abs(_residuals(theta, log_x, loss)) / spread
        slope = np.where(size <= delta, 1.0, delta / np.sqrt(np.maximum(2 * delta * size - delta**2, delta**2)))
        jacobian: np.ndarray = -(slope / spread)[:, None] * _derivatives(theta, log_x)
        return jacobian

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        results = [least_squares(squares, start, derivatives, method="lm", max_nfev=200) for start in starts]
    best: np.ndarray = min(results, key=lambda result: result.cost).x
    return best
