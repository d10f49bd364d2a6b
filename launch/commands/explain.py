"""`convneur explain`: a picture of what a model's gates and memories do to an image."""

import argparse
from pathlib import Path

from convneur.launch.flags import add_weights
from convneur.launch.parser import Overrides, Parsers, add_command


def add(parsers: Parsers) -> None:
    """Adds the command."""
    explain = add_command(parsers, "explain", run, "Draw what a model's gates and memories do to an image.")
    explain.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN", help="folder of a checkpoint, or of a run")
    explain.add_argument("image", type=Path, metavar="IMAGE", help="image file")
    explain.add_argument(
        "-o", "--output", type=Path, default=Path("gates.png"), metavar="FILE", help="picture (default: gates.png)"
    )
    add_weights(explain)


def run(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur explain`: draws what the gates of a model do to an image, and prints their statistics."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.launch.tables import show_table
    from convneur.tools.explain import draw, explain

    explanation = explain(args.path, args.image, averaged=args.ema)
    draw(explanation, args.output)
    headings = ("stage", "gate A", "below 1/4", "above 3/4", "over the image", "surprise, first to last chunk")
    rows = []
    for number, stage in enumerate(explanation.stages, 1):
        gate, surprise = stage.gate, stage.surprise
        rows.append(
            (
                str(number),
                f"{gate.mean():.3f} ± {gate.std():.3f}",
                f"{(gate < 0.25).float().mean():.0%}",
                f"{(gate > 0.75).float().mean():.0%}",
                f"{stage.map.min():.3f} to {stage.map.max():.3f}",
                "-" if surprise is None else f"{surprise[0]:.3g} to {surprise[-1]:.3g}",
            )
        )
    show_table(headings, rows)
    print(f"over the image: smallest and largest mean over the channels\npicture         {args.output}")
    return 0
