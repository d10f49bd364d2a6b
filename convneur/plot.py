"""Curves of a run, drawn from its metrics.jsonl."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from convneur.metrics import read_metrics

CURVE_FILE = "curve.png"


def plot_run(folder: Path) -> Path:
    """Draws training loss, evaluation loss and top-1 against epochs; returns the picture's path."""
    records = read_metrics(folder)
    figure, (losses, accuracy) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, name, label, color in (
        (losses, "train/loss", "training, smoothed and mixed labels", "C0"),
        (losses, "eval/loss", "held out, raw weights", "C1"),
        (losses, "eval/loss_ema", "held out, averaged weights", "C2"),
        (accuracy, "eval/top1", "raw weights", "C1"),
        (accuracy, "eval/top1_ema", "averaged weights", "C2"),
    ):
        points = [(r["epoch"], r[name]) for r in records if name in r]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, color=color, linewidth=1.4)
    losses.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    losses.set_ylim(bottom=0)
    accuracy.set(xlabel="epoch", ylabel="top-1", title="Held-out accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in (losses, accuracy):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(folder.name)
    path = folder / CURVE_FILE
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
