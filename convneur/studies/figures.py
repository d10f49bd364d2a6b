"""The figures of a study's report."""

import io
from collections.abc import Sequence
from math import isfinite

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from convneur.records.metrics import or_nan, read_metrics
from convneur.studies import words
from convneur.studies.fit import METRICS, Findings, StudyFit
from convneur.studies.grid import StudyConfig


def draw(config: StudyConfig, findings: Findings) -> dict[str, bytes]:
    """The PNG files of a study's figures by their names, without those that its runs are too few for."""
    figures = {
        "loss-by-size.png": _by_size(config, findings),
        "memory-against-local.png": _against_local(findings),
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
    return pictures


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
                            label=None if held_out else words.kind(placement),
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


def _against_local(findings: Findings) -> Figure | None:
    if not findings.comparisons:
        return None
    figure, (losses, gap) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for number, comparison in enumerate(findings.comparisons):
        color, budgets = f"C{number}", [one.budget for one in comparison.budgets]
        label = f"{words.kind(comparison.placement)}, {comparison.runs}"
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
        axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="loss", title=words.kind(placement))
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
        axis.set(
            yscale="log", xlabel="epoch", ylabel="held-out loss", title=f"{words.kind(placement)}, {longest} epochs"
        )
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
