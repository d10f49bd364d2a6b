"""`convneur info`: what a model consists of and costs."""

import argparse
import json
from dataclasses import asdict

from convneur.data.errors import InputError
from convneur.launch.flags import add_json
from convneur.launch.imports import importing
from convneur.launch.parser import PIXELS, Overrides, Parsers, add_command


def add(parsers: Parsers) -> None:
    """Adds the command."""
    info = add_command(
        parsers,
        "info",
        run,
        "Show a variant's parameters, operations and stages; takes --model.KEY VALUE.",
        takes_overrides=True,
    )
    info.add_argument("variant", help="n1 to n3, m1 to m9, or a shape such as 24x2-2-6-2")
    info.add_argument(
        "--image-size",
        type=PIXELS,
        default=224,
        metavar="PIXELS",
        help="side of the image (default: 224)",
    )
    add_json(info)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur info`: what a model consists of and costs."""
    with importing():
        from convneur.config import load_config
        from convneur.models.describe import describe

    for word in overrides:
        if word.startswith("--") and not word.startswith("--model."):
            raise InputError(f"{word} has no bearing on a model's size; `convneur info` takes --model.KEY VALUE")
    config = load_config(overrides=["--model.variant", args.variant, *overrides])
    model = describe(config.model, args.image_size)
    if args.json:
        print(json.dumps(asdict(model)))
        return 0

    from convneur.launch.tables import show_table

    def cell(value: object) -> str:
        return "-" if value is None else str(value)

    name = f"ConvNeur-{model.variant.upper()}" if model.stages else model.variant
    print(
        f"{name}: {model.params / 1e6:.3f} M parameters, {model.gmacs:.3f} GMACs"
        f" at {model.image_size} x {model.image_size}\n"
    )
    if not model.stages:
        return 0
    rows = []
    for number, stage in enumerate(model.stages, 1):
        height, width = stage.resolution
        counts = (stage.width, stage.blocks, stage.branches, stage.memory_width, stage.chunk_length, stage.chunks)
        row = (str(number), f"{height}x{width}", *map(cell, counts), f"{stage.params / 1e6:.3f}M", f"{stage.gmacs:.3f}")
        rows.append(row)
    show_table(("stage", "size", "width", "blocks", "global", "d", "L", "chunks", "params", "GMACs"), rows)
    print("global: blocks with a global branch, d channels in its bottleneck, L tokens in a chunk of its memory")
    print("GMACs: multiply-accumulates of matrix products and convolutions, one image; totals include stem and head")
    return 0
