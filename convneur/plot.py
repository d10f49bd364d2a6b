"""Curves of runs, drawn from their metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from convneur.data.errors import InputError
from convneur.metrics import METRICS_FILE, read_metrics

CURVE_FILE = "curve.png"

LOSSES = {
    "train/loss": "training, smoothed and mixed labels",
    "eval/loss": "held out, raw weights",
    "eval/loss_ema": "held out, averaged weights",
}
ACCURACIES = {"eval/top1": "raw weights", "eval/top1_ema": "averaged weights"}
COLORS = {"train/loss": "C0", "eval/loss": "C1", "eval/loss_ema": "C2", "eval/top1": "C1", "eval/top1_ema": "C2"}
STYLES: dict[str, Literal["-", "--", ":"]] = {
    "train/loss": ":",
    "eval/loss": "-",
    "eval/loss_ema": "--",
    "eval/top1": "-",
    "eval/top1_ema": "--",
}


def plot_run(folder: Path) -> Path:
    """Draws training loss, evaluation loss and top-1 against epochs; returns the picture's path."""
    path = folder / CURVE_FILE
    plot_runs([folder], path)
    return path


def plot_runs(folders: Sequence[Path], path: Path) -> None:
    """Draws the same for one run or several, which then have a colour each, and share the styles of lines.

    Raises InputError where one of the folders holds no metrics.
    """
    figure, (losses, accuracy) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    one = len(folders) == 1
    for number, folder in enumerate(folders):
        records = read_metrics(folder)
        if not records:
            raise InputError(f"{folder / METRICS_FILE} holds no metrics, expected the folder of a run")
        for axis, names in ((losses, LOSSES), (accuracy, ACCURACIES)):
            for name, label in names.items():
                points = [(r["epoch"], r[name]) for r in records if name in r]
                if not points:
                    continue
                axis.plot(
                    *zip(*points, strict=True),
                    label=label,
                    color=COLORS[name] if one else f"C{number % 10}",
                    linestyle="-" if one else STYLES[name],
                    linewidth=1.4,
                )
    losses.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    losses.set_ylim(bottom=0)
    accuracy.set(xlabel="epoch", ylabel="top-1", title="Held-out accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in (losses, accuracy):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if one and axis.lines:
            axis.legend(frameon=False)
    if one:
        figure.suptitle(folders[0].resolve().name)
    else:
        runs = [Line2D([], [], color=f"C{i % 10}", label=folder.resolve().name) for i, folder in enumerate(folders)]
        kinds = [Line2D([], [], color="0.3", linestyle=STYLES[name], label=label) for name, label in LOSSES.items()]
        figure.legend(handles=[*runs, *kinds], loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
