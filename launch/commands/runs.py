"""`convneur runs`: what the runs in a folder are doing."""

import argparse
from pathlib import Path

from convneur.launch.parser import Overrides, Parsers, add_command, positive


def add(parsers: Parsers) -> None:
    """Adds the command."""
    runs = add_command(parsers, "runs", run, "List runs: state, epoch, accuracy, speed, time left, restarts, ETTR.")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    runs.add_argument("--watch", action="store_true", help="refresh until interrupted")
    runs.add_argument(
        "--every", type=positive(1e6), default=10.0, metavar="SECONDS", help="between refreshes (default: 10)"
    )


def run(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur runs`: a table of the runs in a folder; again and again with --watch."""
    from convneur.launch.runs import Runs, watch

    runs = Runs(args.folder)
    if args.watch:
        watch(runs, args.every)
    runs.show()
    return 0
