"""The subcommands of `convneur prepare` and `convneur data`, each from parsed arguments to an exit status."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from convneur.data.errors import InputError

if TYPE_CHECKING:
    from convneur.data.prepare.writing import Part

Overrides = Sequence[str]


def prepare_digits(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare digits`."""
    from convneur.data.prepare.digits import prepare_digits

    with _disk_errors():
        written = prepare_digits(args.out, args.format, args.beton_pixels)
    print(f"{args.out}: {'written' if written else 'already there, and intact'}")
    return 0


def prepare_imagenet(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare imagenet`: all of it, or the part of one job of an array."""
    from convneur.data.prepare.imagenet import prepare_imagenet

    part = part_of(args.part)
    with _disk_errors():
        written = prepare_imagenet(
            args.source,
            args.out,
            processes=_processes(args.processes),
            max_side=args.max_side,
            part=part,
            format=args.format,
            pixels=args.beton_pixels,
        )
    if part is None or not written:
        return _tell(args.out, written)
    print(f"{args.out}: part {args.part} written; when all parts are, run the same command without --part")
    return 0


def prepare_synthetic(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare synthetic`."""
    from convneur.data.prepare.synthetic import prepare_synthetic

    height, width = _size(args.size)
    with _disk_errors():
        written = prepare_synthetic(
            args.out,
            classes=args.classes,
            images=args.images,
            height=height,
            width=width,
            processes=_processes(args.processes),
            format=args.format,
            pixels=args.beton_pixels,
        )
    return _tell(args.out, written)


def prepare_index(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare index`: a dataset of shards that somebody else wrote."""
    from convneur.data.prepare.foreign import prepare_index

    with _disk_errors():
        samples = prepare_index(args.shards, args.out, split=args.split, processes=_processes(args.processes))
    print(f"{args.out}: split {args.split} has {samples:,} samples")
    return 0


def verify(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur data verify`: status 1 where something is damaged."""
    from convneur.data.inspect.verify import verify_dataset

    with _disk_errors():
        findings = verify_dataset(args.folder, _processes(args.processes))
    for found in findings:
        for denied in found.denied:
            print(f"{found.split}: {denied.key}: {denied.reason}: denied")
        for line in found.shards:
            print(f"{found.split}: {line}")
        print(f"{found.split}: {found.samples - len(found.denied):,} of {found.samples:,} images intact")
    return 1 if any(found.denied or found.shards for found in findings) else 0


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


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk, or a folder that can't be made, as one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error}: see to it and run the command again, it goes on where it stopped") from None


def _tell(out: Path, written: bool) -> int:
    print(f"{out}: {'written' if written else f'already there; `convneur data verify {out}` checks every byte'}")
    return 0


def _processes(given: int | None) -> int:
    from convneur.data.prepare.parallel import processors

    return processors() if given is None else given


def part_of(text: str | None) -> "Part | None":
    """The value of --part; InputError where it is none."""
    from convneur.data.prepare.writing import Part

    if text is None:
        return None
    number, _, of = text.partition("/")
    if not (_is_count(number) and _is_count(of) and 1 <= int(number) <= int(of)):
        raise InputError(f"--part is {text}, expected I/N with I from 1 to N, such as 3/64")
    return Part(int(number), int(of))


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (_is_count(height) and _is_count(width) and int(height) and int(width)):
        raise InputError(f"--size is {text}, expected HEIGHTxWIDTH in pixels, such as 375x500")
    return int(height), int(width)
