"""`convneur plan`: what a run takes on a cluster, and how the range of a forecast is put in words."""

import argparse
from typing import TYPE_CHECKING

from convneur.launch.flags import add_config, add_gpu, add_json, asked_cluster
from convneur.launch.parser import COUNT, Overrides, Parsers, add_command
from convneur.records.json_files import json_text

if TYPE_CHECKING:
    from convneur.planning.forecast import Plan, Range


def add(parsers: Parsers) -> None:
    """Adds the command."""
    plan = add_command(
        parsers,
        "plan",
        run,
        "Predict memory, speed, communication, hours and disk of a run; takes --section.key VALUE.",
        takes_overrides=True,
    )
    add_config(plan)
    plan.add_argument("--nodes", type=COUNT, default=1, metavar="N", help="nodes (default: 1)")
    plan.add_argument("--gpus-per-node", type=COUNT, default=8, metavar="N", help="GPUs of a node (default: 8)")
    add_gpu(plan)
    add_json(plan)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur plan`: what a configuration takes on a cluster; nothing is allocated."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.config import load_config
    from convneur.limits import check_values
    from convneur.planning.forecast import make_plan

    config = load_config(args.config, overrides)
    check_values(config)
    made = make_plan(config, asked_cluster(args))
    if args.json:
        print(json_text(made.as_json(), indent=2))
        return 0
    print(_headline(made), end="\n\n")
    _show_memory(made)
    _show_time(made)
    print(*_lines(made), sep="\n")
    return 0


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


def _show_memory(made: "Plan") -> None:
    from convneur.launch.tables import show_table

    print("GB of a GPU at the peak of a step")
    parts = ("weights", "optimizer", "averages", "gradients", "buckets", "gathered", "activations", "memory_states")
    headings = {"optimizer": "Adam", "averages": "EMA", "gradients": "grads", "activations": "acts"}
    headings["memory_states"] = "states"
    rows = []
    for stage, held in made.memory.items():
        values = [_gigabytes(getattr(held, name)) for name in (*parts, "total")]
        mark = "*" if stage == made.stage else ""
        rows.append((f"{stage}{mark}", *values, f"{made.largest_micro_batch[stage]:,}"))
    show_table(("ZeRO", *(headings.get(name, name) for name in parts), "total", "images"), rows, text=("ZeRO",))
    print(
        f"* as configured, of {made.capacity / 1e9:.1f} GB. states: of the neural memory, part of the activations\n"
        "(acts). images: of a micro-batch, the most that fit.\n"
    )


def _show_time(made: "Plan") -> None:
    from convneur.launch.tables import show_table

    print("a step")
    parts = sorted(made.seconds.items(), key=lambda item: -item[1].high)
    rows = [
        (part, f"{span.low * 1e3:.2f}", f"{span.high * 1e3:.2f}") for part, span in (*parts, ("all", made.step_seconds))
    ]
    show_table(("goes into", "ms, data sheet", "ms, slow end"), rows, text=("goes into",))
    print()


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
