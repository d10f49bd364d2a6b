"""Times ConvNeur-M1..M4 against timm's ConvNeXt of the same widths, which have no memory branch.

A training step is forward, loss, backward and AdamW; inference is a forward pass. Runs alternate, and the figure to
quote is the ratio of medians. A table for docs/measurements.md comes last; its last column has eager or compiled,
whichever is faster for each of the two.

    python benchmarks/model.py --out model.json
    python benchmarks/model.py --variants m1 m4 --device cuda --batch-size 128 --autocast
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import timm
import torch
import torch.nn.functional as F
from common import add_timing_flags, alternating_seconds, command_line, machine_in_words, row, write_results
from torch import nn

import convneur  # noqa: F401  (registers the models)
from convneur.system.allocator import keep_freed_memory

COUNTERPARTS = {"m1": "convnext_atto", "m2": "convnext_femto", "m3": "convnext_pico", "m4": "convnext_nano"}


def training_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: bool) -> Callable[[], None]:
    """Forward, cross-entropy, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, autocast):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    return step


def inference(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: bool) -> Callable[[], None]:
    """A forward pass without gradients."""

    def step() -> None:
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, autocast):
            model(images)

    model.eval()
    return step


TASKS = {"train": training_step, "inference": inference}


def compare(variant: str, task: str, compiled: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Times a variant and its counterpart in alternation."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (args.batch_size,), device=device)
    steps = {}
    for name in (f"convneur_{variant}", COUNTERPARTS[variant]):
        model = timm.create_model(name).to(device)
        steps[name] = TASKS[task](torch.compile(model) if compiled else model, images, labels, args.autocast)
        for _ in range(args.warmup):
            steps[name]()
    times = alternating_seconds(steps, args.runs, device)
    ours, theirs = (statistics.median(times[name]) for name in steps)
    print(
        f"{variant} {task:9s} {'compiled' if compiled else 'eager':8s} {ours * 1e3:8.1f} ms, {COUNTERPARTS[variant]} "
        f"{theirs * 1e3:8.1f} ms, ratio {ours / theirs:.3f}",
        flush=True,
    )
    return {
        "variant": variant,
        "task": task,
        "compiled": compiled,
        "seconds": ours,
        "counterpart": COUNTERPARTS[variant],
        "counterpart_seconds": theirs,
        "ratio": ours / theirs,
        "all_seconds": times,
    }


def main() -> None:
    """Runs all combinations asked for, prints the table and writes the JSON."""
    parser = command_line(__doc__)
    parser.add_argument("--variants", nargs="+", choices=COUNTERPARTS, default=list(COUNTERPARTS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--image-size", type=int, default=224)
    add_timing_flags(parser, modes=["eager", "compiled"], batch_size=8, warmup=2, runs=7)
    args = parser.parse_args()

    keep_freed_memory()  # for both, as in training
    print(f"{machine_in_words(args.device)}, timm {timm.__version__}")
    results = [
        compare(variant, task, mode == "compiled", args)
        for variant, task, mode in product(args.variants, args.tasks, args.modes)
    ]
    modes = [f"ratio, {mode}" for mode in args.modes]
    print("\n" + row(["model", "counterpart", "pass", *modes, "ratio of the fastest"]))
    print("|---|---|---|" + "---:|" * (len(modes) + 1))
    for variant, task in product(args.variants, args.tasks):
        of_modes = [r for r in results if (r["variant"], r["task"]) == (variant, task)]
        ours, theirs = (min(r[key] for r in of_modes) for key in ("seconds", "counterpart_seconds"))
        cells = [
            *(f"{r['ratio']:.3f}" for r in of_modes),
            f"{ours / theirs:.3f} ({ours * 1e3:.0f} / {theirs * 1e3:.0f} ms)",
        ]
        print(row([variant, COUNTERPARTS[variant], task, *cells]))
    write_results(args, results)


if __name__ == "__main__":
    main()
