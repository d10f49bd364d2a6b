"""`convneur plot`: the curves of runs."""

import argparse
import sys
from pathlib import Path

from convneur.launch.parser import Overrides, Parsers, add_command
from convneur.records.folder import CURVE_FILE


def add(parsers: Parsers) -> None:
    """Adds the command."""
    plot = add_command(parsers, "plot", run, "Draw the curves of one run, or of several together.")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    plot.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="picture (default: RUN/curve.png; curves.png for several)"
    )


def run(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur plot`: draws the curves of runs, finished or not."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.records.curves import plot_runs

    path = args.output or (args.runs[0] / CURVE_FILE if len(args.runs) == 1 else Path("curves.png"))
    for fault in plot_runs(args.runs, path):
        print(f"warning: {fault}", file=sys.stderr)
    print(f"picture  {path}")
    return 0
