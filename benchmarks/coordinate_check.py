"""Coordinate check of muP: how far activations move in a few steps, at several widths, with muP and without.

    python benchmarks/coordinate_check.py
    python benchmarks/coordinate_check.py --transfer --seeds 1

Under muP the change of every activation is of the same order at every width; in the standard parametrization some of
them grow. The first draws docs/mup-coordinates.png; the second trains models of each width at a range of learning rates
and draws docs/mup-transfer.png. Minutes of a core each. Both print what they draw. Data: scikit-learn's digits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
import torch.nn.functional as F
from common import command_line
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from convneur.engine.config import OptimizerConfig, ScheduleConfig
from convneur.engine.optimizer import build_optimizer, build_schedule
from convneur.models.build import build_model
from convneur.models.convneur.config import MemoryConfig, ModelConfig
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.model import ConvNeur
from convneur.ops.memory.equations import MemoryState, retrieve

DOCS = Path(__file__).parents[1] / "docs"
WIDTHS = (16, 32, 64, 128)
TRANSFER_WIDTHS = (8, 16, 32, 64)
DEPTHS = "1-1-2-1"
BASE = f"{WIDTHS[0]}x{DEPTHS}"
BATCH = 64
KINDS = {  # what a curve is of, by the last part of a module's name
    "stem.0": "stem",
    "downsample.1": "downsampling",
    "dwconv": "depthwise convolution",
    "up": "expansion C to 4C",
    "down": "projection 4C to C",
    "reduce": "bottleneck C to C/2",
    "memory": "memory: context",
    "expand": "gate, before the sigmoid",
    "head.fc": "logits",
}
WRITTEN = "memory: what was written"


def digits() -> tuple[Tensor, Tensor]:
    """All scans as 32 x 32 pixels, (1797, 3, 32, 32), and their labels, in an order of their own."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.tensor(data.images[order, None] / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(data.target[order])
    return F.interpolate(images, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1), labels


def model_of(width: int, mup: bool, seed: int) -> ConvNeur:
    """A small model whose first stage reads and writes four chunks."""
    config = ModelConfig(
        f"{width}x{DEPTHS}",
        num_classes=10,
        memory=MemoryConfig(chunk_length=16),
        layer_scale=0.1,
        mup_base=BASE if mup else "",
    )
    torch.manual_seed(seed)
    return build_model(config)


@contextmanager
def watched(model: ConvNeur) -> Iterator[dict[str, list[Tensor]]]:
    """Activations of the passes made inside the block, by kind. What a memory puts out, as its reader scales it."""
    seen: dict[str, list[Tensor]] = {}
    scale = model.config.width_factor**-0.5  # of values, errors and context; see `convneur.models.convneur.mup`

    def memory(module: NeuralMemory, inputs: tuple[Tensor], output: Tensor) -> None:
        tokens, output = inputs[0].flatten(1, -2), output.flatten(1, -2)
        queries = F.normalize(module.project(tokens)[..., : module.dim], dim=-1)
        unwritten = retrieve(MemoryState(module.w1, module.w2), queries)
        seen.setdefault(KINDS["memory"], []).append(output * scale)
        if tokens.shape[1] > module.config.chunk_length:
            seen.setdefault(WRITTEN, []).append((output - unwritten) * scale)

    hooks = []
    for name, module in model.named_modules():
        kind = next((kind for ending, kind in KINDS.items() if f".{name}".endswith(f".{ending}")), None)
        if isinstance(module, NeuralMemory):
            hooks.append(module.register_forward_hook(memory))
        elif kind:
            hooks.append(
                module.register_forward_hook(lambda _m, _i, output, kind=kind: seen.setdefault(kind, []).append(output))
            )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def changes(width: int, mup: bool, seed: int, steps: int, lr: float) -> dict[str, float]:
    """Mean absolute change of a probe batch's activations after some steps, by kind."""
    images, labels = digits()
    probe, model = images[:BATCH], model_of(width, mup, seed)
    optimizer = build_optimizer(model, OptimizerConfig(lr=lr), "torch", BATCH, offload=False)
    build_schedule(optimizer, ScheduleConfig(epochs=1, warmup_epochs=0), 1000).step_update(0)

    def activations() -> dict[str, list[Tensor]]:
        with torch.no_grad(), watched(model) as seen:
            model(probe)
        return seen

    before = activations()
    for step in range(1, steps + 1):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return {
        kind: float(np.mean([(a - b).abs().mean().item() for a, b in zip(now, before[kind], strict=True)]))
        for kind, now in activations().items()
    }


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Exponent of a power of the width fitted to the values."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def coordinate_check(steps: int, lr: float, seeds: int) -> Figure:
    """Prints slopes and draws the changes after the last step against the width."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
    slopes: dict[str, list[float]] = {}
    for axis, mup in zip(axes, (False, True), strict=True):
        runs = {w: [changes(w, mup, seed, steps, lr) for seed in range(seeds)] for w in WIDTHS}
        for number, kind in enumerate([*KINDS.values(), WRITTEN]):
            values = [float(np.mean([run[kind] for run in runs[w]])) for w in WIDTHS]
            slopes.setdefault(kind, []).append(slope(WIDTHS, values))
            axis.plot(WIDTHS, values, "o-", color=f"C{number}", label=f"{kind}")
            print(f"{'muP' if mup else 'standard':9}{kind:28}{'  '.join(f'{value:.3g}' for value in values)}")
        title = f"muP, base {WIDTHS[0]}" if mup else "standard parametrization"
        axis.set(xscale="log", yscale="log", xlabel="width of the first stage, C", title=title)
        _tidy(axis)
    axes[0].set_ylabel(f"mean |change| after {steps} steps")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    print(f"\n{'exponent of the width':28}{'standard':>10}{'muP':>8}")
    for kind, (standard, scaled) in slopes.items():
        print(f"{kind:28}{standard:+10.2f}{scaled:+8.2f}")
    return figure


def final_loss(width: int, mup: bool, lr: float, seed: int, epochs: int) -> float:
    """Mean loss of the last epoch's batches; infinite where it is not a number."""
    images, labels = digits()
    steps_per_epoch = len(images) // BATCH
    model = model_of(width, mup, seed)
    optimizer = build_optimizer(model, OptimizerConfig(lr=lr), "torch", BATCH, offload=False)
    schedule = build_schedule(optimizer, ScheduleConfig(epochs, 0.5, warmup_lr=0, min_lr=0), steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps_per_epoch):
            batch = order[step * BATCH : (step + 1) * BATCH]
            schedule.step_update(epoch * steps_per_epoch + step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    mean = float(np.mean(losses[-steps_per_epoch:]))
    return mean if np.isfinite(mean) else np.inf


def transfer(rates: Sequence[float], seeds: int, epochs: int) -> Figure:
    """Prints and draws training loss against the learning rate."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, mup in zip(axes, (False, True), strict=True):
        for number, width in enumerate(TRANSFER_WIDTHS):
            losses = [np.mean([final_loss(width, mup, lr, seed, epochs) for seed in range(seeds)]) for lr in rates]
            best = int(np.argmin(losses))
            axis.plot(rates, losses, "o-", color=f"C{number}", label=f"width {width}")
            axis.plot(rates[best], losses[best], "*", color=f"C{number}", markersize=14)
            text = "  ".join(f"{loss:.4f}" for loss in losses)
            print(f"{'muP' if mup else 'standard':9}width {width:4}  best {rates[best]:g}  {text}", flush=True)
        title = f"muP, base {WIDTHS[0]}" if mup else "standard parametrization"
        axis.set(xscale="log", yscale="log", xlabel="learning rate", title=title)
        _tidy(axis)
        axis.legend(frameon=False, fontsize="small")
    axes[0].set_ylabel(f"training loss of epoch {epochs}")
    return figure


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_xlabel().startswith("width"):
        axis.set_xticks(WIDTHS, labels=map(str, WIDTHS))
        axis.minorticks_off()


def main() -> None:
    """Runs one of the two and saves its figure."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of the coordinate check")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the coordinate check")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--transfer", action="store_true", help="loss against the learning rate instead")
    parser.add_argument("--epochs", type=int, default=2, help="length of a training for --transfer")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for the figure")
    args = parser.parse_args()
    if args.transfer:
        rates = [float(rate) for rate in 2.0 ** np.arange(-10, -3)]
        figure, name = transfer(rates, args.seeds, args.epochs), "mup-transfer.png"
    else:
        figure, name = coordinate_check(args.steps, args.lr, args.seeds), "mup-coordinates.png"
    figure.savefig(args.out / name, dpi=100)
    print(f"written {args.out / name}")


if __name__ == "__main__":
    main()
