"""How the noise between runs changes with their size: a power of it, estimated from the residuals of a fit.

Noise that rises or falls with the size leaves a fit without weights unbiased, but its intervals wrong: those of an
extrapolation come from the largest sizes' noise. Weights that follow the modelled spread, and intervals that draw noise
of that spread, mend both (least squares so: Romano and Wolf, "Resurrecting weighted least squares", 2017).

log s = u b: u (n, k) is each run's place on k axes, -1/2 to 1/2 or so, b (k,) the log of the spread's ratio over them.
"""

import math

import numpy as np
from scipy.optimize import minimize

PRIOR = math.log(10)  # standard deviation of b before the runs are seen: few runs hardly tell one spread from another
SMALLEST = 1e-6  # residuals below it are rounding


class Places:
    """Where runs of certain sizes x (n, k) lie on the axes; others are held to the range of these."""

    def __init__(self, x: np.ndarray) -> None:
        log_x = np.log(x)
        self._center, width = log_x.mean(axis=0), np.ptp(log_x, axis=0)
        self._width = np.where(width > 0, width, 1.0)
        scaled = (log_x - self._center) / self._width
        self._least, self._most = scaled.min(axis=0), scaled.max(axis=0)

    def of(self, x: np.ndarray) -> np.ndarray:
        """(m, k) -> u (m, k)."""
        place: np.ndarray = np.clip((np.log(x) - self._center) / self._width, self._least, self._most)
        return place


def estimate_slopes(places: np.ndarray, residuals: np.ndarray, leverage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """b (k,), and its covariance (k, k), from the residuals (n,) of a fit and each run's leverage in it, below 1.

    Residuals are taken as Laplace's, whose estimate hardly heeds outliers: it minimises the sum of log s + |r| / s.
    """
    runs, axes = places.shape
    size = np.maximum(np.abs(residuals), SMALLEST) / np.sqrt(1 - leverage)
    columns = np.column_stack([np.ones(runs), places])
    prior = np.diag([0.0] + [PRIOR**-2] * axes)

    def cost(b: np.ndarray) -> float:
        log_s = columns @ b
        return float((log_s + size * np.exp(-log_s)).sum() + b @ prior @ b / 2)

    def slope(b: np.ndarray) -> np.ndarray:
        gradient: np.ndarray = columns.T @ (1 - size * np.exp(-columns @ b)) + prior @ b
        return gradient

    def curvature(b: np.ndarray) -> np.ndarray:
        hessian: np.ndarray = columns.T @ (columns * (size * np.exp(-columns @ b))[:, None]) + prior
        return hessian

    start = np.array([math.log(size.mean())] + [0.0] * axes)
    found = minimize(cost, start, jac=slope, hess=curvature, method="trust-exact").x
    # Where the noise is normal, |r| tells by a variance of pi / 2 - 1 of the log of its spread.
    covariance = np.linalg.inv(columns.T @ columns / (math.pi / 2 - 1) + prior)
    return found[1:], covariance[1:, 1:]
