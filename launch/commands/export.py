"""`convneur export`: a checkpoint as a file for others."""

import argparse
from pathlib import Path

from convneur.launch.flags import add_weights
from convneur.launch.parser import Overrides, Parsers, add_command


def add(parsers: Parsers) -> None:
    """Adds the command."""
    export = add_command(
        parsers, "export", run, "Write a checkpoint as a file for others, checked to give the same logits."
    )
    export.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN", help="folder of a checkpoint, or of a run")
    export.add_argument(
        "--format",
        required=True,
        choices=["safetensors", "onnx", "torch"],
        help="safetensors: the weights, as timm's convneur_* models name them; onnx; torch: for torch.export.load",
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: the run's name, here)")
    add_weights(export)


def run(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur export`: writes a checkpoint as a file for others, once it has given the same logits."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.tools.export import export_checkpoint

    written = export_checkpoint(args.path, args.format, args.out, averaged=args.ema)
    takes = "" if args.format == "safetensors" else f"; takes any batch{' and image size' * written.any_size}"
    print(f"{written.path}: logits within {written.difference:.1e} of the checkpoint's{takes}")
    return 0
