"""What the finished runs of a study say: laws fitted to them, what those predict, and memory against local-only.

All of it works on the part of a study that is there. Where that is not enough, a line says why instead of a number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convneur.data.files import atomic_write
from convneur.records.json_files import json_text
from convneur.studies.equal_compute import Difference, IsoFlop, differences, isoflops
from convneur.studies.grid import LOCAL_ONLY, Point, StudyConfig, best_rates
from convneur.studies.scaling_law import (
    FEWEST_LENGTHS,
    Fit,
    Interval,
    RefusedError,
    bootstrap,
    check_falls,
    check_range,
)

LEVEL = 0.95
FIT_FILE = "fit.json"
METRICS: dict[str, Callable[[Point], float]] = {
    "loss": lambda point: point.loss,
    "top-1 error": lambda point: 1 - point.top1,
}
AXES: dict[str, Callable[[Point], float]] = {
    "parameters": lambda point: point.params,
    "MACs": lambda point: point.macs,
    "images seen": lambda point: point.images,
}


@dataclass(frozen=True)
class Prediction:
    """What a fit says of a size that it has not seen.

    Attributes:
        size: variant or shape.
        x: its value on the fit's axis.
        runs: how often it was run; 0 if not yet.
        predicted: for the mean of those runs (the law itself, where there are none), with its interval.
        measured: that mean; None without runs.
    """

    size: str
    x: float
    runs: int
    predicted: Interval
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus 1; None without runs, or where nothing was wrong in them."""
        return self.predicted.value / self.measured - 1 if self.measured else None


@dataclass(frozen=True)
class Window:
    """The same fit without its smallest sizes.

    Attributes:
        smallest: the smallest x that is left.
        sizes: how many different ones are.
        floor: E.
        exponent: alpha.
    """

    smallest: float
    sizes: int
    floor: Interval
    exponent: Interval


@dataclass(frozen=True)
class StudyFit:
    """A law along one axis, or the reason why there is none.

    Attributes:
        metric: "loss" or "top-1 error".
        axis: "parameters", "MACs", "images seen", or "parameters and images seen" for the joint law.
        placement: of the models.
        runs: which of the study's runs, in words.
        points: those runs.
        fit: the law with its intervals.
        refusal: why there is no fit.
        predictions: for the held-out sizes.
        windows: how the fit depends on its smallest sizes; the first window is the whole.
    """

    metric: str
    axis: str
    placement: str
    runs: str
    points: tuple[Point, ...]
    fit: Fit | None = None
    refusal: str | None = None
    predictions: tuple[Prediction, ...] = ()
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Memory against local-only, both trained on as many images, at equal compute."""

    placement: str
    runs: str
    budgets: tuple[Difference, ...]


@dataclass(frozen=True)
class Findings:
    """All that is made of a study's finished runs.

    Attributes:
        points: the runs, all learning rates.
        fits: along all axes.
        comparisons: memory against local-only.
        isoflops: loss against size at equal compute, for each placement.
        notes: what a reader has to know, a line each.
    """

    points: tuple[Point, ...]
    fits: tuple[StudyFit, ...]
    comparisons: tuple[Comparison, ...]
    isoflops: dict[str, tuple[IsoFlop, ...]]
    notes: tuple[str, ...]


def find(config: StudyConfig, points: Sequence[Point], damaged: Sequence[str] = ()) -> Findings:
    """Fits and compares what there is, each point at its best learning rate; runs that diverged are named instead.

    `damaged` has a line for each run that couldn't be read; they become notes.
    """
    finite = [point for point in points if math.isfinite(point.loss)]
    chosen, notes = best_rates(finite)
    notes += [
        f"{point.place.name} has a loss of {point.loss}: left out" for point in points if not math.isfinite(point.loss)
    ]
    for size in [*config.study.sizes, *config.study.held_out]:
        if warning := replace(config.model, variant=size).depth_warning:
            notes.append(f"{size} has {warning}")
    notes += damaged
    recipes = sorted({(point.place.unique_images, point.place.epochs) for point in chosen})
    fits = []
    for placement in config.study.placements:
        mine = [point for point in chosen if point.place.placement == placement]
        for metric in METRICS:
            for recipe in recipes:
                of_recipe = [point for point in mine if _recipe(point) == recipe]
                fits += [_fit_sizes(config, metric, axis, placement, of_recipe, recipe) for axis in AXES_OF_SIZE]
            fits += _fit_lengths(config, metric, placement, mine)
            fits.append(_fit_joint(config, metric, placement, mine))
    return Findings(
        points=tuple(points),
        fits=tuple(fits),
        comparisons=tuple(_compare(config, chosen, recipes)),
        isoflops={p: tuple(_isoflops([x for x in chosen if x.place.placement == p])) for p in config.study.placements},
        notes=tuple(notes),
    )


AXES_OF_SIZE = ("parameters", "MACs")


def recipe_in_words(unique_images: int, epochs: int) -> str:
    """Such as "all images, 9 epochs"."""
    return f"{f'{unique_images:,}' if unique_images else 'all'} images, {epochs} epochs"


def _recipe(point: Point) -> tuple[int, int]:
    return point.place.unique_images, point.place.epochs


def _fit_sizes(
    config: StudyConfig, metric: str, axis: str, placement: str, points: Sequence[Point], recipe: tuple[int, int]
) -> StudyFit:
    """The law over sizes that were trained alike."""
    seen = [point for point in points if point.place.size not in config.study.held_out]
    words = recipe_in_words(*recipe)
    value, x_of = METRICS[metric], AXES[axis]
    try:
        check_range([point.params for point in seen])
        fit = _bootstrap(seen, metric, [axis])
    except RefusedError as error:
        return StudyFit(metric, axis, placement, words, tuple(seen), refusal=str(error))
    predictions = []
    for size in config.study.held_out:
        runs = [point for point in points if point.place.size == size]
        if runs:
            x = x_of(runs[0])
            predicted = fit.predict(np.array([[x]]), runs=len(runs))[0]
            predictions.append(Prediction(size, x, len(runs), predicted, float(np.mean([value(p) for p in runs]))))
    windows = [_window(fit, [x_of(point) for point in seen])]
    for smallest in sorted({point.params for point in seen})[1:]:
        left = [point for point in seen if point.params >= smallest]
        try:
            check_range([point.params for point in left])
            windows.append(_window(_bootstrap(left, metric, [axis]), [x_of(point) for point in left]))
        except RefusedError:
            break
    return StudyFit(metric, axis, placement, words, tuple(seen), fit, None, tuple(predictions), tuple(windows))


def _window(fit: Fit, xs: Sequence[float]) -> Window:
    return Window(min(xs), len(set(xs)), fit.floor, fit.exponent())


def _bootstrap(points: Sequence[Point], metric: str, axes: Sequence[str]) -> Fit:
    x = np.array([[AXES[axis](point) for axis in axes] for point in points], float)
    values = np.array([METRICS[metric](point) for point in points])
    check_falls(x, values, axes)
    return bootstrap(x, values, level=LEVEL)


def _fit_lengths(config: StudyConfig, metric: str, placement: str, points: Sequence[Point]) -> list[StudyFit]:
    """The law of one size over the images it has seen: of the largest size, as it needs data most."""
    axis = "images seen"
    if not points:
        return []
    largest = max(points, key=lambda point: point.params).place.size
    mine = [point for point in points if point.place.size == largest]
    try:
        check_range([point.images for point in mine], axis)
        return [StudyFit(metric, axis, placement, largest, tuple(mine), _bootstrap(mine, metric, [axis]))]
    except RefusedError as error:
        return [StudyFit(metric, axis, placement, largest, tuple(mine), refusal=str(error))]


def _fit_joint(config: StudyConfig, metric: str, placement: str, points: Sequence[Point]) -> StudyFit:
    """The joint law in parameters and images seen, over all runs but those of held-out sizes."""
    axes = ["parameters", "images seen"]
    name, words = " and ".join(axes), "all runs"
    seen = [point for point in points if point.place.size not in config.study.held_out]
    try:
        check_range([point.params for point in seen])
        lengths = len({point.images for point in seen})
        if lengths < FEWEST_LENGTHS:
            raise RefusedError(f"{lengths} different numbers of images seen, expected at least {FEWEST_LENGTHS}")
        return StudyFit(metric, name, placement, words, tuple(seen), _bootstrap(seen, metric, axes))
    except RefusedError as error:
        return StudyFit(metric, name, placement, words, tuple(seen), refusal=str(error))


def _compare(config: StudyConfig, points: Sequence[Point], recipes: Sequence[tuple[int, int]]) -> list[Comparison]:
    compared = []
    for placement in config.study.placements:
        if placement == LOCAL_ONLY:
            continue
        for recipe in recipes:
            with_memory, local = (
                _curve([p for p in points if _recipe(p) == recipe and p.place.placement == kind])
                for kind in (placement, LOCAL_ONLY)
            )
            if found := differences(with_memory, local, LEVEL):
                compared.append(Comparison(placement, recipe_in_words(*recipe), tuple(found)))
    return compared


def _isoflops(points: Sequence[Point]) -> list[IsoFlop]:
    sizes = sorted({point.params for point in points})
    return isoflops({size: _curve([point for point in points if point.params == size]) for size in sizes})


def _curve(points: Sequence[Point]) -> dict[float, list[float]]:
    curve: dict[float, list[float]] = {}
    for point in points:
        curve.setdefault(point.macs, []).append(point.loss)
    return curve


def save_findings(findings: Findings, folder: Path) -> Path:
    """Writes fit.json into the study's folder."""
    path = folder / FIT_FILE
    with atomic_write(path) as file:
        file.write(json_text(_as_json(findings), indent=2).encode())
    return path


def _as_json(findings: Findings) -> dict[str, Any]:
    fits = []
    for fit in findings.fits:
        line: dict[str, Any] = {
            "metric": fit.metric,
            "axis": fit.axis,
            "placement": fit.placement,
            "runs": fit.runs,
            "points": len(fit.points),
            "refusal": fit.refusal,
        }
        if fit.fit:
            line |= {
                "law": asdict(fit.fit.law),
                "level": fit.fit.level,
                "floor": asdict(fit.fit.floor),
                "exponents": [asdict(fit.fit.exponent(term)) for term in range(len(fit.fit.law.exponents))],
                "predictions": [{**asdict(prediction), "error": prediction.error} for prediction in fit.predictions],
                "windows": [asdict(window) for window in fit.windows],
            }
        fits.append(line)
    return {
        "fits": fits,
        "comparisons": [asdict(comparison) for comparison in findings.comparisons],
        "isoflops": {placement: [asdict(one) for one in many] for placement, many in findings.isoflops.items()},
        "notes": list(findings.notes),
    }
