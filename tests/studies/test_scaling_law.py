"""Laws that are known: found without noise, held by the intervals with it, and refused where runs can't carry them."""

import numpy as np
import pytest

from convneur.studies.equal_compute import differences, isoflops
from convneur.studies.scaling_law import Law, RefusedError, bootstrap, check_range, fit_law

SIZES = np.geomspace(1e5, 1e7, 7)


@pytest.mark.parametrize(("floor", "exponent"), [(0.0, 0.3), (0.4, 0.25), (1.69, 0.9)])
def test_a_law_without_noise_is_found(floor: float, exponent: float) -> None:
    law = Law(floor, (0.7 * 1e6**exponent,), (exponent,))
    x = SIZES[:, None]
    found = fit_law(x, law(x))
    assert found.floor == pytest.approx(floor, abs=2e-4)
    assert found.exponents == pytest.approx([exponent], rel=1e-3)
    assert found(100 * x) == pytest.approx(law(100 * x), rel=1e-3)


def test_the_joint_law_of_chinchilla_is_found_to_its_digits() -> None:
    law = Law(1.8172, (482.01, 2085.43), (0.3478, 0.3658))  # arXiv 2404.10102
    x = np.array([(size, tokens) for size in np.geomspace(5e7, 1e10, 6) for tokens in np.geomspace(1e9, 3e11, 4)])
    found = fit_law(x, law(x), delta=1e-3)
    assert found.floor == pytest.approx(1.8172, rel=1e-3)
    assert found.exponents == pytest.approx((0.3478, 0.3658), rel=1e-3)
    assert found.coefficients == pytest.approx((482.01, 2085.43), rel=2e-2)


def test_one_wild_run_does_not_carry_the_law_away() -> None:
    law = Law(0.5, (60.0,), (0.4,))
    x = np.repeat(SIZES, 3)[:, None]
    loss = law(x) * np.exp(np.random.default_rng(0).normal(0, 0.005, len(x)))
    loss[-1] *= 3
    assert fit_law(x, loss).floor == pytest.approx(0.5, rel=0.1)
    squares = fit_law(x, loss, delta=1e6)  # Huber's cost with nothing beyond its threshold
    assert abs(squares.floor - 0.5) > 0.1


def test_intervals_hold_as_often_as_they_say() -> None:
    """24 draws of 80 % intervals: fewer than 13 or all of 24 held has a probability below 1 % if they are honest."""
    law, draws, held = Law(0.5, (60.0,), (0.4,)), 24, 0
    x = np.repeat(SIZES, 2)[:, None]
    for draw in range(draws):
        loss = law(x) * np.exp(np.random.default_rng(draw).normal(0, 0.02, len(x)))
        held += bootstrap(x, loss, level=0.8, replicates=60, seed=draw).exponent().holds(0.4)
    assert 13 <= held < draws


def test_a_run_to_come_is_less_certain_than_the_law() -> None:
    law = Law(0.5, (60.0,), (0.4,))
    x = np.repeat(SIZES, 3)[:, None]
    loss = law(x) * np.exp(np.random.default_rng(3).normal(0, 0.02, len(x)))
    fit = bootstrap(x, loss, replicates=100)
    beyond = np.array([[1e8]])
    widths = [(one.high - one.low) for one in (fit.predict(beyond)[0], fit.predict(beyond, runs=1)[0])]
    assert widths[0] < widths[1]
    assert bootstrap(x, loss, replicates=100).floor == fit.floor  # drawn from a seed


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1e5, 1e6, 1e7, 1e8, 1e8], "4 different numbers of parameters, expected at least 5"),
        (np.geomspace(1e5, 9e5, 8), "range over a factor of 9, expected at least 10, a decade"),
    ],
)
def test_too_few_or_too_close_sizes_are_refused(sizes: list[float], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        check_range(sizes)


def test_what_has_no_logarithm_or_no_freedom_is_refused() -> None:
    with pytest.raises(RefusedError, match="has no logarithm"):
        fit_law(SIZES[:, None], np.array([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.0]))
    with pytest.raises(RefusedError, match="3 runs for a law of 3 parameters, expected at least 4"):
        fit_law(SIZES[:3, None], np.array([3.0, 2.0, 1.5]))


def _isoflop_curves(sizes: np.ndarray) -> dict[float, dict[float, list[float]]]:
    """Losses that are lowest at 1e6 parameters, whatever the compute."""
    lengths = np.geomspace(1e15, 1e17, 5)
    return {
        size: {compute: [(1 + 0.1 * np.log(size / 1e6) ** 2) * compute**-0.1] for compute in lengths} for size in sizes
    }


def test_isoflop_curves_find_the_best_size_and_flag_the_boundary() -> None:
    inside = isoflops(_isoflop_curves(np.geomspace(1e5, 1e7, 5)))
    assert len(inside) == 5
    assert [one.best_size for one in inside] == pytest.approx([1e6] * 5, rel=1e-3)
    assert all(one.best_size is None for one in isoflops(_isoflop_curves(np.geomspace(1e6, 1e8, 5))))
    assert all(one.best_size is None for one in isoflops(_isoflop_curves(np.geomspace(1e4, 9e5, 5))))
    assert not isoflops(_isoflop_curves(np.array([1e5, 1e6])))


def test_differences_at_equal_compute() -> None:
    first, second = {1e3: [0.9, 1.1], 1e5: [0.45, 0.55]}, {1e4: [1.0, 1.0], 1e6: [0.5, 0.5]}
    low, high = differences(first, second)
    assert (low.budget, high.budget) == (1e4, 1e5)
    assert low.first == pytest.approx(np.sqrt(np.sqrt(0.9 * 1.1 * 0.45 * 0.55)))  # halfway in log between two means
    assert low.difference == pytest.approx(low.first - 1.0)
    assert low.interval is not None
    assert high.interval is not None
    # Pooled over 4 points with a degree of freedom each; half of either neighbour's variance counts at `low`.
    variance = 2 * 2 * (np.log(1.1 / 0.9) / 2) ** 2 / 4
    half = 2.776445 * np.sqrt(variance * (low.first**2 / 4 + 1.0**2 / 2))
    assert low.interval.high - low.difference == pytest.approx(half, rel=1e-5)


def test_no_interval_is_drawn_from_single_runs() -> None:
    (only,) = differences({1e3: [1.0], 1e5: [0.5]}, {1e4: [0.8]})
    assert only.interval is None
    assert differences({1e3: [1.0]}, {1e5: [0.5]}) == []


def test_a_law_without_a_floor_has_none_in_its_interval() -> None:
    sizes = np.repeat(np.geomspace(2e4, 6e5, 6), 3)
    noise = np.random.default_rng(3).normal(0, 0.02, len(sizes))
    floor = bootstrap(sizes[:, None], (sizes / 1e5) ** -0.35 * np.exp(noise), replicates=100).floor
    assert floor.low == 0 <= floor.value
