"""The report of a study: one HTML page with everything in it, its figures as PNG files, and the runs as CSV."""

import base64
import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from math import isfinite
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from convneur.config import config_text
from convneur.data.errors import DamagedError
from convneur.data.files import atomic_write
from convneur.models.convneur.model import variant_named
from convneur.records.saved import or_nan, read_metrics
from convneur.studies.cost import read_study_plan, total
from convneur.studies.equal_compute import Difference
from convneur.studies.fit import LEVEL, METRICS, Findings, StudyFit
from convneur.studies.grid import LOCAL_ONLY, Place, Point, StudyConfig, study_runs
from convneur.studies.scaling_law import LARGEST_EXPONENT, Interval
from convneur.studies.series import series_folder

REPORT_FILE, POINTS_FILE = "report.html", "points.csv"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 77rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } img { max-width: 100%; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 0.8rem; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: 0.2rem 0.5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
.note { color: #555; font-size: 0.9rem }
"""


def write_report(config: StudyConfig, findings: Findings, folder: Path) -> list[Path]:
    """Writes report.html, points.csv and the figures into a folder; returns their paths, the page first."""
    figures = {
        "loss-by-size.png": _by_size(config, findings),
        "memory-against-local.png": _against(findings),
        "isoflop.png": _isoflop(findings),
        "training.png": _training(config, findings),
    }
    pictures = {}
    for name, figure in figures.items():
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100, format="png")
        plt.close(figure)
        pictures[name] = buffer.getvalue()
    page = _page(config, findings, pictures)
    contents = {REPORT_FILE: page.encode(), POINTS_FILE: _csv(findings.points).encode(), **pictures}
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in contents]


def fit_lines(findings: Findings) -> Iterator[str]:
    """The findings as lines of text: laws or why there are none, predictions, comparisons, notes."""
    yield f"{len(findings.points)} runs are finished; intervals are of {LEVEL:.0%}"
    for fit in findings.fits:
        what = f"{fit.metric} by {fit.axis}, {_name(fit.placement)}, {fit.runs}"
        yield f"{what}: {_law(fit) if fit.fit else f'no fit: {fit.refusal}'}"
        for line in fit.predictions:
            yield f"    held out {line.size}: predicted {interval(line.predicted)}, {_measured(line.measured)}"
    for comparison in findings.comparisons:
        last = comparison.budgets[-1]
        what = f"{_name(comparison.placement)} - local-only, {comparison.runs}, {last.budget:.3g} MACs"
        yield f"{what}: {_difference(last)}"
    for placement, curves in findings.isoflops.items():
        for curve in curves:
            yield f"best size at {curve.budget:.3g} MACs, {_name(placement)}: {_best(curve.best_size)}"
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


def _name(placement: str) -> str:
    return "local-only" if placement == LOCAL_ONLY else f"memory {placement}"


def _law(fit: StudyFit) -> str:
    assert fit.fit is not None
    exponents = (f"exponent {exponent(fit.fit.exponent(term))}" for term in range(len(fit.fit.law.exponents)))
    return ", ".join([f"floor {interval(fit.fit.floor)}", *exponents])


def _measured(value: float | None) -> str:
    return "not measured" if value is None else f"measured {value:.4g}"


def _best(size: float | None) -> str:
    return "at the boundary of the sizes, or no minimum: not determined" if size is None else f"{size:.3g} parameters"


def _difference(one: Difference) -> str:
    if one.interval is None:
        return f"{one.difference:+.4f}, no interval: no point was run twice"
    inside = one.interval.holds(0)
    return f"{one.difference:+.4f} [{one.interval.low:+.4f}, {one.interval.high:+.4f}]" + (
        ", not told apart from 0" if inside else ""
    )


# The page.


def _page(config: StudyConfig, findings: Findings, pictures: Mapping[str, bytes]) -> str:
    finished = len(findings.points)
    parts = [
        f"<h1>Scaling study {escape(config.run.name)}</h1>",
        f"<p>{finished} of {len(study_runs(config))} runs are finished. "
        f"Sizes {', '.join(config.study.sizes)}; held out {', '.join(config.study.held_out) or 'none'}. Images of "
        f"{config.data.image_size} x {config.data.image_size} pixels from {escape(config.data.root)}. A size such as "
        f"{config.study.sizes[0]} {_size_in_words(config.study.sizes[0])}. Loss is the cross-entropy on the held-out "
        f"images, of the averaged weights where a run keeps an average. All intervals "
        f"are of {LEVEL:.0%}.</p>",
        "<h2>What it says</h2><ul>",
        *(f"<li>{escape(line)}</li>" for line in _summary(config, findings)),
        "</ul>",
        "<h2>Loss and error by size</h2>",
        _picture(pictures, "loss-by-size.png"),
        "<p class=note>A point is a run. Lines are the fitted laws L = E + A N<sup>-&alpha;</sup>, bands the intervals"
        " of the laws; where there is no line, the section on laws says why. Hollow points are of held-out sizes, which"
        " no fit has seen.</p>",
        "<h2>Memory against local-only at equal compute</h2>",
        _picture(pictures, "memory-against-local.png"),
        _table(
            ("runs", "training MACs", "loss with memory", "loss local-only", "difference"),
            (
                (c.runs, f"{b.budget:.3g}", f"{b.first:.4f}", f"{b.second:.4f}", _difference(b))
                for c in findings.comparisons
                for b in c.budgets
            ),
        ),
        "<p class=note>At every budget that was run of either kind, the other kind's loss is interpolated between its"
        " neighbouring sizes. The intervals are Student's, from the spread between seeds.</p>",
        "<h2>Fitted laws</h2>",
        _table(
            ("law", "kind", "runs", "points", "floor E", "exponents"),
            (_fit_row(fit) for fit in findings.fits if fit.fit),
        ),
        *(f"<p class=note>{escape(line)}</p>" for line in _refusals(findings)),
        "<h2>Held-out sizes</h2>",
        _table(
            ("size", "law", "kind", "runs", "predicted, for their mean", "measured", "error", "within the interval"),
            (
                (
                    p.size,
                    f"{f.metric} by {f.axis}",
                    _name(f.placement),
                    f"{f.runs}, {p.runs} seeds",
                    interval(p.predicted),
                    f"{p.measured:.4g}",
                    "-" if p.error is None else f"{p.error:+.1%}",
                    "yes" if p.predicted.holds(p.measured) else "no",
                )
                for f in findings.fits
                for p in f.predictions
                if p.measured is not None
            ),
        ),
        "<h2>How the fit depends on its smallest sizes</h2>",
        "<p class=note>The same fit without the smallest size, without the two smallest, and so on, as long as five"
        " sizes and a decade of parameters are left; a single line says that no size may go.</p>",
        _table(
            ("law", "kind", "runs", "from", "sizes", "floor E", "exponent"),
            (
                (
                    f"{f.metric} by {f.axis}",
                    _name(f.placement),
                    f.runs,
                    f"{w.smallest:.3g}",
                    str(w.sizes),
                    interval(w.floor),
                    exponent(w.exponent),
                )
                for f in findings.fits
                for w in f.windows
            ),
        ),
        "<h2>Best size at equal compute</h2>",
        "<p class=note>A curve joins sizes that were trained with equal compute, interpolated between lengths of"
        " training. Where its lowest point is its end, a still smaller or larger size may be better: the curve is"
        " dashed, and no best size is given.</p>",
        _picture(pictures, "isoflop.png"),
        _table(
            ("kind", "training MACs", "sizes", "best size"),
            (
                (_name(placement), f"{c.budget:.3g}", str(len(c.sizes)), _best(c.best_size))
                for placement, curves in findings.isoflops.items()
                for c in curves
            ),
        ),
        "<h2>Training</h2>",
        _picture(pictures, "training.png"),
        "<h2>Cost</h2>",
        _table(
            ("size", "kind", "parameters", "MACs of a run, longest", "finished runs", "spent", "predicted for all"),
            _cost_rows(config, findings),
        ),
        "<p class=note>Spent: hours of every GPU, or of every core that computed: wall time times ranks times threads."
        " They include evaluation, checkpoints and waiting for other work on the machine. Predicted: GPU hours of all"
        " runs, by `convneur study run --plan`.</p>",
        "<h2>How it was made</h2>",
        "<p>Laws are fitted to the logarithm of the losses by Huber's cost from many starts. Their intervals come from"
        " a bootstrap that gives every run the residual of a run drawn at random, scaled to the spread of the noise at"
        " its size, taken for a power of it. They can't be promised where the noise changes in another way, and"
        " don't answer for the law being the wrong one. No fit is made below five sizes or a decade of parameters. What"
        " lies beyond the largest size is extrapolated.</p>",
        "<h2>Runs</h2>",
        _table(POINT_COLUMNS[1:], (_point_cells(point)[1:] for point in findings.points)),
        f"<details><summary>The recipe of all runs</summary><pre>{escape(config_text(config))}</pre></details>",
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(config.run.name)}</title>"
    return f"{head}<style>{STYLE}</style>\n" + "\n".join(parts) + "</html>\n"


def _summary(config: StudyConfig, findings: Findings) -> Iterator[str]:
    for comparison in findings.comparisons:
        last = comparison.budgets[-1]
        yield (
            f"Memory against local-only, {comparison.runs}: at {last.budget:.3g} MACs, the largest budget that both"
            f" kinds reach, loss is {last.first:.4f} with memory and {last.second:.4f} local-only; the difference is"
            f" {_difference(last)}."
        )
    for fit in findings.fits:
        if fit.metric == "loss" and fit.axis == "parameters":
            what = f"Loss by parameters, {_name(fit.placement)}, {fit.runs}"
            predictions = "".join(
                f" It predicts {interval(line.predicted)} for {line.size}; {_measured(line.measured)}."
                for line in fit.predictions
            )
            yield f"{what}: {_law(fit)}.{predictions}" if fit.fit else f"{what}: no fit, {fit.refusal}."
    yield from findings.notes


def _size_in_words(size: str) -> str:
    shape = variant_named(size)
    *depths, last = map(str, shape.depths)
    return f"has {shape.base_width} channels in its first stage and {', '.join(depths)} and {last} blocks in the four"


def _picture(pictures: Mapping[str, bytes], name: str) -> str:
    if name not in pictures:
        return "<p class=note>Not enough runs yet.</p>"
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(pictures[name]).decode()}">'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return "<p class=note>Not enough runs yet.</p>"
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _fit_row(fit: StudyFit) -> tuple[str, ...]:
    assert fit.fit is not None
    exponents = "; ".join(exponent(fit.fit.exponent(term)) for term in range(len(fit.fit.law.exponents)))
    law = f"{fit.metric} by {fit.axis}"
    return law, _name(fit.placement), fit.runs, str(len(fit.points)), interval(fit.fit.floor), exponents


def _refusals(findings: Findings) -> Iterator[str]:
    """Why some laws are not there, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for fit in findings.fits:
        if fit.refusal:
            what = f"{fit.metric} by {fit.axis}, {_name(fit.placement)}, {fit.runs}"
            reasons.setdefault(fit.refusal, []).append(what)
    for reason, laws in reasons.items():
        yield f"No fit, because of {reason}: {'; '.join(laws)}."


def _cost_rows(config: StudyConfig, findings: Findings) -> Iterator[tuple[str, ...]]:
    try:
        planned, unplanned = read_study_plan(series_folder(config)), "not planned"
    except DamagedError as error:
        planned, unplanned = {}, f"not known: {error}"
    places = [place for place in study_runs(config) if place.name in planned]

    def predicted(of: Iterable[Place]) -> str:
        spans = [planned[place.name] for place in of]
        return f"{total(spans).low:.3g} to {total(spans).high:.3g} GPU h" if spans else unplanned

    for size in [*config.study.sizes, *config.study.held_out]:
        for placement in config.study.placements:
            mine = [p for p in findings.points if (p.place.size, p.place.placement) == (size, placement)]
            if mine:
                macs = f"{max(p.macs for p in mine):.3g}"
                hours = predicted(place for place in places if (place.size, place.placement) == (size, placement))
                yield size, _name(placement), f"{mine[0].params:,}", macs, str(len(mine)), _hours(mine), hours
    yield "all", "", "", "", str(len(findings.points)), _hours(findings.points), predicted(places)


def _hours(points: Sequence[Point]) -> str:
    spent = {kind: sum(p.hours for p in points if p.device == kind) for kind in sorted({p.device for p in points})}
    return ", ".join(f"{hours:.3g} {kind} h" for kind, hours in spent.items())


POINT_COLUMNS = (
    "run", "size", "placement", "unique images", "epochs", "lr", "seed", "parameters", "training MACs", "images seen",
    "loss", "top-1", "hours", "device", "commit",
)  # fmt: skip


def _point_cells(point: Point) -> tuple[str, ...]:
    place = point.place
    commit = point.commit or "not known"
    return (
        place.name,
        place.size,
        place.placement,
        str(place.unique_images or "all"),
        str(place.epochs),
        f"{place.lr:g}",
        str(place.seed),
        str(point.params),
        f"{point.macs:.6g}",
        str(point.images),
        f"{point.loss:.5f}",
        f"{point.top1:.5f}",
        f"{point.hours:.4g}",
        point.device,
        commit if not commit[:40].isalnum() else commit[:12] + commit[40:],
    )


def _csv(points: Sequence[Point]) -> str:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(POINT_COLUMNS)
    writer.writerows(_point_cells(point) for point in points)
    return lines.getvalue()


# The figures.


def _by_size(config: StudyConfig, findings: Findings) -> Figure:
    recipes = sorted({(p.place.unique_images, p.place.epochs) for p in findings.points})
    figure, grid = plt.subplots(
        len(METRICS), len(recipes), figsize=(1 + 4.2 * len(recipes), 7), layout="constrained", squeeze=False
    )
    fits = [fit for fit in findings.fits if fit.axis == "parameters"]
    for row, (metric, value) in enumerate(METRICS.items()):
        for column, recipe in enumerate(recipes):
            axis = grid[row][column]
            shown = [p for p in findings.points if (p.place.unique_images, p.place.epochs) == recipe]
            for number, placement in enumerate(config.study.placements):
                mine = [p for p in shown if p.place.placement == placement]
                for held_out in (False, True):
                    some = [p for p in mine if (p.place.size in config.study.held_out) == held_out]
                    if some:
                        axis.plot(
                            [p.params for p in some],
                            [value(p) for p in some],
                            "o",
                            color=f"C{number}",
                            markerfacecolor="none" if held_out else None,
                            markersize=5,
                            alpha=0.7,
                            label=None if held_out else _name(placement),
                        )
                for fit in fits:
                    if fit.metric == metric and fit.placement == placement and fit.fit and fit.points[0] in mine:
                        _draw_law(axis, fit, [p.params for p in mine], f"C{number}")
            images = f"{recipe[0]:,}" if recipe[0] else "all"
            positive = all(value(p) > 0 for p in shown if isfinite(p.loss))  # not where nothing was wrong
            axis.set(xscale="log", yscale="log" if positive else "linear", xlabel="parameters", ylabel=metric)
            axis.set_title(f"{images} images, {recipe[1]} epochs")
            _tidy(axis)
    return figure


def _draw_law(axis: Axes, fit: StudyFit, xs: Sequence[float], color: str) -> None:
    assert fit.fit is not None
    grid = np.geomspace(min(xs), max(xs), 60)
    line = fit.fit.predict(grid[:, None])
    axis.plot(grid, [one.value for one in line], color=color, linewidth=1.4)
    axis.fill_between(grid, [one.low for one in line], [one.high for one in line], color=color, alpha=0.15, linewidth=0)


def _against(findings: Findings) -> Figure | None:
    if not findings.comparisons:
        return None
    figure, (losses, gap) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for number, comparison in enumerate(findings.comparisons):
        color, budgets = f"C{number}", [one.budget for one in comparison.budgets]
        label = f"{_name(comparison.placement)}, {comparison.runs}"
        losses.plot(budgets, [one.first for one in comparison.budgets], color=color, marker="o", label=label)
        local = [one.second for one in comparison.budgets]
        losses.plot(budgets, local, color=color, marker="s", linestyle="--", label=f"local-only, {comparison.runs}")
        gap.plot(budgets, [one.difference for one in comparison.budgets], color=color, marker="o", label=label)
        known = [one for one in comparison.budgets if one.interval]
        gap.fill_between(
            [one.budget for one in known],
            [one.interval.low for one in known if one.interval],
            [one.interval.high for one in known if one.interval],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    gap.axhline(0, color="black", linewidth=0.8)
    losses.set(xscale="log", yscale="log", xlabel="training MACs", ylabel="loss", title="Loss at equal compute")
    gap.set(xscale="log", xlabel="training MACs", ylabel="loss with memory - local-only", title="Below 0 memory wins")
    for axis in (losses, gap):
        _tidy(axis, legend=False)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _isoflop(findings: Findings) -> Figure | None:
    drawn = {placement: curves for placement, curves in findings.isoflops.items() if curves}
    if not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(5 * len(drawn), 4), layout="constrained", squeeze=False)
    for axis, (placement, curves) in zip(axes[0], drawn.items(), strict=True):
        for number, curve in enumerate(curves):
            color = plt.get_cmap("viridis")(number / max(len(curves) - 1, 1))  # budgets have an order
            axis.plot(
                curve.sizes,
                curve.losses,
                marker="o",
                linestyle="-" if curve.best_size else "--",
                color=color,
                label=f"{EngFormatter(places=1, sep='')(curve.budget)} MACs",
            )
            if curve.best_size:
                axis.axvline(curve.best_size, color=color, linestyle=":", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="loss", title=_name(placement))
        _tidy(axis)
    return figure


def _training(config: StudyConfig, findings: Findings) -> Figure:
    figure, axes = plt.subplots(
        1, len(config.study.placements), figsize=(5 * len(config.study.placements), 4), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    sizes = [*config.study.sizes, *config.study.held_out]
    longest = max(p.place.epochs for p in findings.points)
    for axis, placement in zip(axes[0], config.study.placements, strict=True):
        labelled = set()
        for point in findings.points:
            place = point.place
            if place.placement != placement or place.epochs != longest:
                continue
            records = [r for r in read_metrics(point.folder) if "eval/loss" in r]
            losses = [or_nan(r.get("eval/loss_ema", r["eval/loss"])) for r in records]
            color = plt.get_cmap("viridis")(sizes.index(place.size) / max(len(sizes) - 1, 1))
            label = None if place.size in labelled else place.size
            labelled.add(place.size)
            axis.plot([r["epoch"] for r in records], losses, ".-", color=color, linewidth=1, label=label)
        axis.set(yscale="log", xlabel="epoch", ylabel="held-out loss", title=f"{_name(placement)}, {longest} epochs")
        _tidy(axis)
    return figure


def _tidy(axis: Axes, legend: bool = True) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    for side, text in ((axis.xaxis, EngFormatter(sep="")), (axis.yaxis, FuncFormatter(lambda value, _: f"{value:g}"))):
        if side.get_scale() == "log":  # a decade or so, where matplotlib's own labels run into each other
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(text)
            side.set_minor_formatter(NullFormatter())
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small")
