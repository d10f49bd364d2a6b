"""`convneur plan`, from parsed arguments to an exit status; and what it and `convneur study run --plan` print."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from convneur.plan import Cluster, Plan, Range


def plan(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`convneur plan`: what a configuration takes on a cluster; nothing is allocated."""
    from convneur.world import name_accelerator

    name_accelerator()
    from convneur.config import load_config
    from convneur.plan import make_plan

    made = make_plan(load_config(args.config, overrides), cluster(args))
    if args.json:
        print(json.dumps(made.as_json(), indent=2))
        return 0
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(_headline(made))
    console.print(_memory_table(made))
    console.print(_time_table(made))
    for line in _lines(made):
        console.print(line)
    return 0


def cluster(args: argparse.Namespace) -> "Cluster":
    """The machines that --nodes, --gpus-per-node and --gpu name."""
    from convneur.gpu import load_gpu
    from convneur.plan import Cluster

    return Cluster(load_gpu(args.gpu), args.nodes, args.gpus_per_node)


def words(span: "Range", unit: str) -> str:
    """Such as "1.2 to 3.4 h"."""
    low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (span.low, span.high))
    return f"{low if low == high else f'{low} to {high}'} {unit}".strip()


def _headline(made: "Plan") -> str:
    accumulated = f" x {made.accumulation} micro-batches" if made.accumulation > 1 else ""
    return (
        f"{made.variant}: {made.params / 1e6:.1f} M parameters on {made.nodes} x {made.ranks // made.nodes} {made.gpu},"
        f" {made.micro_batch} images a GPU{accumulated}, {made.precision}, ZeRO {made.stage}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}" if size < 10e9 else f"{size / 1e9:.1f}"


def _memory_table(made: "Plan") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=0, title="GB of a GPU at the peak of a step", title_justify="left")
    parts = ("weights", "optimizer", "averages", "gradients", "buckets", "gathered", "activations", "memory_states")
    headings = {"optimizer": "Adam", "averages": "EMA", "gradients": "grads", "activations": "acts"}
    headings["memory_states"] = "states"
    table.add_column("ZeRO")
    for name in (*parts, "total"):
        table.add_column(headings.get(name, name), justify="right")
    table.add_column("images", justify="right")
    for stage, held in made.memory.items():
        values = [_gigabytes(getattr(held, name)) for name in (*parts, "total")]
        mark = "*" if stage == made.stage else ""
        table.add_row(f"{stage}{mark}", *values, f"{made.largest_micro_batch[stage]:,}")
    table.caption = (
        f"* as configured, of {made.capacity / 1e9:.1f} GB. states: of the neural memory, part of the activations\n"
        "(acts). images: of a micro-batch, the most that fit."
    )
    table.caption_justify = "left"
    return table


def _time_table(made: "Plan") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=0, title="a step", title_justify="left")
    for heading in ("goes into", "ms, data sheet", "ms, slow end"):
        table.add_column(heading, justify="left" if heading == "goes into" else "right")
    for part, span in sorted(made.seconds.items(), key=lambda item: -item[1].high):
        table.add_row(part, f"{span.low * 1e3:.2f}", f"{span.high * 1e3:.2f}")
    table.add_row("all", f"{made.step_seconds.low * 1e3:.2f}", f"{made.step_seconds.high * 1e3:.2f}")
    return table


def _lines(made: "Plan") -> list[str]:
    gigabytes = made.checkpoint_bytes / 1e9
    lines = [
        f"speed        {words(made.images_per_second, 'images/s')}, MFU {words(made.mfu.times(100), '%')};"
        f" bound by: {made.binds}",
        f"sent         {made.sent_bytes / 1e9:.3g} GB by each GPU, a step",
        f"data         {words(made.read_bytes_per_second.times(1e-9), 'GB/s')} in all,"
        f" {words(made.cores_per_gpu, 'cores')} a GPU to decode",
        f"run          {made.steps:,} steps, {words(made.hours, 'h')}, {words(made.gpu_hours, 'GPU hours')}",
        f"checkpoints  {gigabytes:.3g} GB each, {gigabytes * made.kept_checkpoints:.3g} GB kept",
    ]
    if made.host_bytes:
        lines.append(f"host memory  {made.host_bytes / 1e9:.3g} GB a rank, for the optimizer")
    return [*lines, *(f"assumed: {line}" for line in made.assumed), *(f"warning: {line}" for line in made.warnings)]
