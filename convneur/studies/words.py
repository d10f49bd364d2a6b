"""The findings of a study as lines of text."""

from collections.abc import Iterator

from convneur.studies.equal_compute import Difference
from convneur.studies.fit import LEVEL, Findings, StudyFit
from convneur.studies.grid import LOCAL_ONLY
from convneur.studies.scaling_law import LARGEST_EXPONENT, Interval


def fit_lines(findings: Findings) -> Iterator[str]:
    """The findings as lines of text: laws or why there are none, predictions, comparisons, notes."""
    yield f"{len(findings.points)} runs are finished; intervals are of {LEVEL:.0%}"
    for fit in findings.fits:
        what = f"{fit.metric} by {fit.axis}, {kind(fit.placement)}, {fit.runs}"
        yield f"{what}: {law(fit) if fit.fit else f'no fit: {fit.refusal}'}"
        for line in fit.predictions:
            yield f"    held out {line.size}: predicted {interval(line.predicted)}, {measured(line.measured)}"
    for comparison in findings.comparisons:
        last = comparison.budgets[-1]
        what = f"{kind(comparison.placement)} - local-only, {comparison.runs}, {last.budget:.3g} MACs"
        yield f"{what}: {difference(last)}"
    for placement, curves in findings.isoflops.items():
        for curve in curves:
            yield f"best size at {curve.budget:.3g} MACs, {kind(placement)}: {best_size(curve.best_size)}"
    yield from findings.notes


def interval(value: Interval | None, digits: int = 3) -> str:
    """Such as "0.412 [0.380, 0.447]"."""
    if value is None:
        return "-"
    return f"{_number(value.value, digits)} [{_number(value.low, digits)}, {_number(value.high, digits)}]"


def exponent(value: Interval) -> str:
    """The same for an exponent, where the largest that a fit may take is no bound."""
    text = interval(value)
    return f"{text.rpartition(',')[0]}, no bound)" if value.high > 0.999 * LARGEST_EXPONENT else text


def _number(value: float, digits: int) -> str:
    return "0" if abs(value) < 1e-6 else f"{value:.{digits}g}"


def kind(placement: str) -> str:
    """Of models with such a placement."""
    return "local-only" if placement == LOCAL_ONLY else f"memory {placement}"


def law(fit: StudyFit) -> str:
    """The parameters of a law that is there."""
    assert fit.fit is not None
    exponents = (f"exponent {exponent(fit.fit.exponent(term))}" for term in range(len(fit.fit.law.exponents)))
    return ", ".join([f"floor {interval(fit.fit.floor)}", *exponents])


def measured(value: float | None) -> str:
    """What a prediction is held against."""
    return "not measured" if value is None else f"measured {value:.4g}"


def best_size(size: float | None) -> str:
    """Where an IsoFLOP curve is lowest."""
    return "at the boundary of the sizes, or no minimum: not determined" if size is None else f"{size:.3g} parameters"


def difference(one: Difference) -> str:
    """A difference of losses, and whether it is one."""
    if one.interval is None:
        return f"{one.difference:+.4f}, no interval: no point was run twice"
    inside = one.interval.holds(0)
    return f"{one.difference:+.4f} [{one.interval.low:+.4f}, {one.interval.high:+.4f}]" + (
        ", not told apart from 0" if inside else ""
    )
