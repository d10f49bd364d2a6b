"""Curves of runs, drawn from their metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.records.folder import CURVE_FILE, METRICS_FILE
from convneur.records.metrics import Metrics, salvage_metrics
from convneur.tasks.metrics import METRICS, Metric

LineStyle = str | tuple[float, tuple[float, ...]]

# Values of the metrics that are drawn: where, what they are called, and, among few runs, the colour and style.
LOSSES = {
    "train/loss": "training, smoothed and mixed labels",
    "eval/loss": "held out, raw weights",
    "eval/loss_ema": "held out, averaged weights",
}
RAW = {f"eval/{primary.name}": primary for primary, *_ in METRICS.values()}
AVERAGED = {f"{name}_ema": metric for name, metric in RAW.items()}
SCORES = dict.fromkeys(RAW, "raw weights") | dict.fromkeys(AVERAGED, "averaged weights")
COLORS = {
    "train/loss": "C0",
    "eval/loss": "C1",
    "eval/loss_ema": "C2",
    **dict.fromkeys(RAW, "C1"),
    **dict.fromkeys(AVERAGED, "C2"),
}
STYLES: dict[str, Literal["-", "--", ":"]] = {
    "train/loss": ":",
    "eval/loss": "-",
    "eval/loss_ema": "--",
    **dict.fromkeys(RAW, "-"),
    **dict.fromkeys(AVERAGED, "--"),
}

PALETTE = 10
"""Colours that are told apart; of more runs than that, several have one, and each has a style of line of its own."""
DASHES: tuple[LineStyle, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1, 2, 3)))
MARKERS = ("", "o", "^", "s", "x", "D", "v", "+")

Curves = dict[str, list[tuple[float, float]]]


def plot_run(folder: Path) -> Path:
    """Draws what is intact of a run's losses and its task's first metric against epochs; the picture's path."""
    path = folder / CURVE_FILE
    _draw({folder.resolve().name: _curves(salvage_metrics(folder)[0])}, path)
    return path


def plot_runs(folders: Sequence[Path], path: Path) -> list[str]:
    """Draws the same for one run or several; returns a line for each that is left out, or of which lines are missing.

    Up to ten runs have a colour each, and share the styles of lines; of more, each kind of curve has a panel.
    Raises InputError where none of the folders holds metrics, or the picture can't be written.
    """
    drawn: dict[str, Curves] = {}
    faults = []
    for folder in folders:
        try:
            records, damaged = salvage_metrics(folder)
        except InputError as error:
            faults.append(f"left out: {error}")
            continue
        faults += damaged[:1] + ([f"{folder}: and {len(damaged) - 1} lines more"] if len(damaged) > 1 else [])
        curves = _curves(records)
        if not curves:
            faults.append(f"left out: {folder / METRICS_FILE} holds no metrics, expected the folder of a run")
            continue
        name = folder.resolve().name
        drawn[name if name not in drawn else str(folder)] = curves
    if not drawn:
        raise InputError(faults[0].removeprefix("left out: "))
    try:
        _draw(drawn, path)
    except (OSError, ValueError) as error:  # a ValueError: the suffix is of no kind of picture
        raise InputError(f"the picture {path} can't be written ({error}): name another file") from error
    return faults


def _curves(records: Sequence[Metrics]) -> Curves:
    """Epochs and values of all that is drawn, and that there is."""
    found = {}
    for name in (*LOSSES, *SCORES):
        points = [(r["epoch"], r[name]) for r in records if r.get(name) is not None]
        if points:
            found[name] = points
    return found


def _draw(runs: Mapping[str, Curves], path: Path) -> None:
    figure = _many(runs) if len(runs) > PALETTE else _few(runs)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=130)
    plt.close(figure)


def _few(runs: Mapping[str, Curves]) -> Figure:
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    one = len(runs) == 1
    for number, curves in enumerate(runs.values()):
        for axis, names in ((losses, LOSSES), (scores, SCORES)):
            for name in names:
                if name in curves:
                    color, style = (COLORS[name], "-") if one else (f"C{number}", STYLES[name])
                    axis.plot(*zip(*curves[name], strict=True), label=names[name], color=color, ls=style, lw=1.4)
    shown = next((_metric(name) for curves in runs.values() for name in curves if name in SCORES), None)
    _label(losses, "Loss", None)
    _label(scores, f"Held-out {shown.kind}" if shown else "", shown)
    if one:
        figure.suptitle(_plain(next(iter(runs))))
        for axis in (losses, scores):
            if axis.lines:
                axis.legend(frameon=False)
        return figure
    handles = [Line2D([], [], color=f"C{number}", label=_plain(name)) for number, name in enumerate(runs)]
    handles += [Line2D([], [], color="0.3", linestyle=STYLES[name], label=label) for name, label in LOSSES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _many(runs: Mapping[str, Curves]) -> Figure:
    """A panel for each kind of curve; a run has the same colour, style and marker in all of them."""
    kinds = [name for name in (*LOSSES, *SCORES) if any(name in curves for curves in runs.values())]
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    longest = max(map(len, runs))
    names = max(1, min(5, 190 // (longest + 12)))  # beside each other in the legend
    height = 3.6 * rows + 0.21 * math.ceil(len(runs) / names)
    figure, grid = plt.subplots(rows, columns, figsize=(15, height), layout="constrained", squeeze=False)
    styles = [_style(number) for number in range(len(runs))]
    for axis, kind in zip_longest(grid.flat, kinds):
        if kind is None:
            axis.set_axis_off()
            continue
        for curves, style in zip(runs.values(), styles, strict=True):
            if kind in curves:
                axis.plot(*zip(*curves[kind], strict=True), linewidth=1.3, markevery=0.1, markersize=4, **style)
        metric = _metric(kind)
        title = metric.title.capitalize() if metric else "Loss"
        _label(axis, f"{title}: {(LOSSES | SCORES)[kind]}", metric)
    handles = [Line2D([], [], label=_plain(name), **style) for name, style in zip(runs, styles, strict=True)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=names, frameon=False, fontsize="small", handlelength=4
    )
    return figure


def _style(number: int) -> dict[str, Any]:
    """Of the lines of one among many runs: another for each of 400."""
    dash, marker = number // PALETTE % len(DASHES), number // PALETTE // len(DASHES) % len(MARKERS)
    return {"color": f"C{number % PALETTE}", "linestyle": DASHES[dash], "marker": MARKERS[marker]}


def _metric(curve: str) -> Metric | None:
    """What a curve shows; None for a loss."""
    return (RAW | AVERAGED).get(curve)


def _label(axis: Axes, title: str, metric: Metric | None) -> None:
    axis.set(xlabel="epoch", ylabel=metric.title if metric else "loss", title=title)
    if metric is None:
        axis.set_ylim(bottom=0)
    elif metric.form.endswith("%"):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: $ would begin a formula, and a first _ hides it from a legend."""
    shown = "".join(c if c.isprintable() else "?" for c in name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
