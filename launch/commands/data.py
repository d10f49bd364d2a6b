"""`convneur data`: checks a dataset, or looks into it."""

import argparse
from pathlib import Path

from convneur.data.errors import InputError
from convneur.launch.commands.prepare import disk_errors
from convneur.launch.flags import add_config, add_processes, asked_processes
from convneur.launch.parser import Overrides, Parsers, add_command, add_group


def add(parsers: Parsers) -> None:
    """Adds the command, with its actions."""
    actions = add_group(parsers, "data", "Check a dataset, or look into it.", dest="action")
    _add_verify(actions)
    _add_show(actions)


def _add_verify(actions: Parsers) -> None:
    command = add_command(
        actions, "verify", verify, "Check every byte and decode every image; deny those that can't be read."
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="prepared dataset")
    command.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="the dataset that it was tiled from: compare the images' pixels, too",
    )
    add_processes(command)


def verify(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur data verify`: status 1 where something is damaged."""
    from convneur.data.inspect.verify import verify_dataset

    with disk_errors():
        findings = verify_dataset(args.folder, asked_processes(args), args.against)
    for found in findings:
        for denied in found.denied:
            print(f"{found.split}: {denied.key}: {denied.reason}: denied")
        for line in found.shards:
            print(f"{found.split}: {line}")
        tiled = f", {found.tiled:,} of them tiled" if found.tiled else ""
        print(f"{found.split}: {found.samples - len(found.denied):,} of {found.samples:,} images intact{tiled}")
    return 1 if any(found.denied or found.shards for found in findings) else 0


def _add_show(actions: Parsers) -> None:
    command = add_command(
        actions,
        "show",
        show,
        "Show counts, sizes and class balance, and draw augmented samples; takes configuration keys.",
        takes_overrides=True,
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="prepared dataset")
    add_config(command, "YAML file with the augmentation")
    command.add_argument(
        "--sheet", type=Path, default=Path("samples.png"), metavar="FILE", help="picture to draw (default: samples.png)"
    )


def show(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur data show`: counts, sizes and class balance, and a picture of what training sees.

    Status 1 where the index of a split is damaged.
    """
    from convneur.config import load_config
    from convneur.data.inspect.show import measure_shuffle, summarize
    from convneur.launch.tables import show_table
    from convneur.limits import check_values
    from convneur.tools.contact_sheet import contact_sheet

    config = load_config(args.config, [*overrides, "--data.root", str(args.folder)])
    check_values(config)
    damaged: list[str] = []
    manifest, summaries = summarize(args.folder, damaged)
    print(f"{args.folder}: {manifest.source}, {len(manifest.classes):,} classes")
    headings = ("split", "shards", "images", "denied", "GB", "kB an image", "images a class", "empty")
    rows = [
        (
            split.split,
            f"{split.shards:,}",
            f"{split.samples:,}",
            f"{split.denied:,}",
            f"{split.bytes / 1e9:.3f}",
            "/".join(f"{size / 1e3:.1f}" for size in split.image_bytes),
            "/".join(f"{count:,}" for count in split.class_samples),
            f"{split.empty_classes:,}",
        )
        for split in summaries
    ]
    show_table(headings, rows, text=("split",))
    print("kB an image, images a class: least/median/most; empty: classes without any")
    for line in damaged:
        print(f"damaged: {line}")
    data = config.data
    if any(split.split == data.train_split and split.samples for split in summaries):
        setting = f"data.lanes {data.lanes}, data.window {data.window}, data.block {data.block}"
        print(f"shuffle of {data.train_split} with {setting}: {measure_shuffle(data, config.run.seed)}")
    try:
        bad = contact_sheet(config.data, args.sheet, seed=config.run.seed)
    except OSError as error:
        raise InputError(f"--sheet {args.sheet} can't be written ({error}): name another file") from None
    for reason in bad:
        print(reason)
    print(f"{args.sheet}: what training shows the model, with its labels")
    return 1 if damaged else 0
