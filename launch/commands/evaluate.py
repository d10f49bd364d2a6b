"""`convneur eval`: a checkpoint's accuracy, measured on any number of ranks."""

import argparse
from dataclasses import asdict
from pathlib import Path

from convneur.launch.flags import add_json, add_launch, add_weights
from convneur.launch.parser import PIXELS, Overrides, Parsers, add_command, positive
from convneur.launch.rank import is_rank, joined_world, words_of_rank
from convneur.records.json_files import json_text


def add(parsers: Parsers) -> None:
    """Adds the command."""
    evaluate = add_command(parsers, "eval", run, "Measure a checkpoint's accuracy.")
    evaluate.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN", help="folder of a checkpoint, or of a run")
    evaluate.add_argument("--data", metavar="DIR", help="prepared dataset (default: the run's own)")
    evaluate.add_argument("--split", help="split of the dataset (default: the run's own)")
    evaluate.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="lines CLASS_OF_THE_DATASET tab CLASS_OF_THE_MODEL (default: classes are called the same)",
    )
    evaluate.add_argument(
        "--image-size",
        type=PIXELS,
        metavar="PIXELS",
        help="side of the images (default: as in training)",
    )
    evaluate.add_argument(
        "--crop",
        type=positive(1),
        metavar="FRACTION",
        help="part of the resized image's side that is cut out (default: the run's data.eval_crop)",
    )
    add_weights(evaluate)
    add_launch(evaluate)
    add_json(evaluate)


def run(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur eval`: scores a checkpoint on any number of ranks."""
    if not is_rank(args):
        from convneur.launch.local import rank_count, run_ranks

        return run_ranks(words_of_rank(args), rank_count(args.nproc))

    with joined_world() as world:
        from convneur.tools.evaluate import evaluate_checkpoint

        scores = evaluate_checkpoint(
            args.path,
            world,
            data_root=args.data,
            split=args.split,
            averaged=args.ema,
            image_size=args.image_size,
            crop=args.crop,
            class_map=args.class_map,
        )
        if world.is_main and args.json:
            print(json_text(asdict(scores)))
        elif world.is_main:
            print(
                f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f} on {scores.images:,} images"
            )
            if scores.among:
                print(
                    f"top-1 {scores.top1_among:.2%}, top-5 {scores.top5_among:.2%} choosing among the {scores.among:,} "
                    "classes that there are images of"
                )
            for line in scores.warnings:
                print(f"warning: {line}")
    return 0
