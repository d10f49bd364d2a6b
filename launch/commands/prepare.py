"""`convneur prepare`: datasets as WebDataset shards, or in FFCV's format."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convneur.data.errors import InputError
from convneur.launch.flags import add_part, add_processes, asked_part, asked_processes, is_count
from convneur.launch.parser import COUNT, Command, Overrides, Parser, Parsers, add_command, add_group, whole

PART = "write the Ith of N parts only, as a job of an array; when all are written, run once without"


def add(parsers: Parsers) -> None:
    """Adds the command, with an action for each source of a dataset."""
    datasets = add_group(
        parsers, "prepare", "Write a dataset as WebDataset shards, or in FFCV's format.", dest="dataset"
    )
    _add_digits(datasets)
    _add_imagenet(datasets)
    _add_synthetic(datasets)
    _add_index(datasets)
    _add_tile(datasets)


def _add_dataset(datasets: Parsers, name: str, run: Command, summary: str) -> Parser:
    dataset = add_command(datasets, name, run, summary)
    dataset.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    return dataset


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=["tar", "ffcv", "both"],
        default="tar",
        help="tar: WebDataset shards (default); ffcv: .beton files, for FFCV; a dataset of shards keeps them and gets"
        " .beton files besides",
    )
    parser.add_argument(
        "--beton-pixels",
        choices=["jpg", "raw"],
        default="jpg",
        help="what .beton files hold: the original JPEGs (default), or pixels, which take far more room",
    )


def _add_tiles(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--tiles",
        required=required,
        type=whole(1, 64),
        metavar="N",
        help="rewrite JPEGs without loss, with a restart marker every N units of 16x16 pixels or so (4 is good): the"
        " parts that a random crop needs can be decoded alone then; needs a C++ compiler",
    )


def _add_digits(datasets: Parsers) -> None:
    digits = _add_dataset(datasets, "digits", prepare_digits, "Scanned handwritten digits that ship with scikit-learn.")
    _add_format(digits)


def prepare_digits(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare digits`."""
    from convneur.data.prepare.digits import prepare_digits

    with disk_errors():
        written = prepare_digits(args.out, args.format, args.beton_pixels)
    print(f"{args.out}: {'written' if written else 'already there, and intact'}")
    return 0


def _add_imagenet(datasets: Parsers) -> None:
    imagenet = _add_dataset(datasets, "imagenet", prepare_imagenet, "ImageNet, from its archives or its folders.")
    imagenet.add_argument(
        "--source",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz,"
        " or with train/nXXXXXXXX/*.JPEG and val/nXXXXXXXX/*.JPEG",
    )
    imagenet.add_argument(
        "--max-side",
        type=COUNT,
        metavar="PIXELS",
        help="scale larger images down to this longer side, and encode anew",
    )
    add_part(imagenet, PART)
    _add_format(imagenet)
    _add_tiles(imagenet)
    add_processes(imagenet)


def prepare_imagenet(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare imagenet`: all of it, or the part of one job of an array."""
    from convneur.data.prepare.imagenet import prepare_imagenet

    with disk_errors():
        written = prepare_imagenet(
            args.source,
            args.out,
            processes=asked_processes(args),
            max_side=args.max_side,
            part=asked_part(args),
            format=args.format,
            pixels=args.beton_pixels,
            tiles=args.tiles or 0,
        )
    return _tell(args.out, written, args.part)


def _add_synthetic(datasets: Parsers) -> None:
    synthetic = _add_dataset(datasets, "synthetic", prepare_synthetic, "Natural-looking images, for benchmarks.")
    synthetic.add_argument("--classes", type=COUNT, default=1000, metavar="K", help="classes (default: 1000)")
    synthetic.add_argument("--images", type=COUNT, default=10000, metavar="N", help="training images (default: 10000)")
    synthetic.add_argument("--size", default="375x500", metavar="HxW", help="pixels (default: 375x500)")
    _add_format(synthetic)
    _add_tiles(synthetic)
    add_processes(synthetic)


def prepare_synthetic(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare synthetic`."""
    from convneur.data.prepare.synthetic import prepare_synthetic

    height, width = _size(args.size)
    with disk_errors():
        written = prepare_synthetic(
            args.out,
            classes=args.classes,
            images=args.images,
            height=height,
            width=width,
            processes=asked_processes(args),
            format=args.format,
            pixels=args.beton_pixels,
            tiles=args.tiles or 0,
        )
    return _tell(args.out, written)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (is_count(height) and is_count(width) and int(height) and int(width)):
        raise InputError(f"--size is {text}, expected HEIGHTxWIDTH in pixels, such as 375x500")
    return int(height), int(width)


def _add_index(datasets: Parsers) -> None:
    index = _add_dataset(
        datasets,
        "index",
        prepare_index,
        "An index for shards that somebody else wrote, which stay there; or tiled copies of them.",
    )
    index.add_argument(
        "shards",
        metavar="URL_OR_GLOB",
        help="WebDataset tars with jpg, jpeg, png or webp and cls: paths, http(s):// or s3://; {000..099}, * and ?",
    )
    index.add_argument("--split", default="train", help="split that they make up (default: train)")
    _add_tiles(index)
    add_processes(index)


def prepare_index(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare index`: a dataset of shards that somebody else wrote."""
    from convneur.data.prepare.foreign import prepare_index

    with disk_errors():
        samples = prepare_index(
            args.shards, args.out, split=args.split, processes=asked_processes(args), tiles=args.tiles or 0
        )
    print(f"{args.out}: split {args.split} has {samples:,} samples")
    return 0


def _add_tile(datasets: Parsers) -> None:
    tile = _add_dataset(datasets, "tile", prepare_tile, "A copy of a prepared dataset, with tiled JPEGs.")
    tile.add_argument("folder", type=Path, metavar="DIR", help="prepared dataset; it stays as it is")
    _add_tiles(tile, required=True)
    add_part(tile, PART)
    _add_format(tile)
    add_processes(tile)


def prepare_tile(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur prepare tile`: all of it, or the part of one job of an array."""
    from convneur.data.prepare.tile import prepare_tile

    with disk_errors():
        written = prepare_tile(
            args.folder,
            args.out,
            tiles=args.tiles,
            processes=asked_processes(args),
            part=asked_part(args),
            format=args.format,
            pixels=args.beton_pixels,
        )
    return _tell(args.out, written, args.part)


def _tell(out: Path, written: bool, part: str | None = None) -> int:
    if part and written:
        print(f"{out}: part {part} written; when all parts are, run the same command without --part")
        return 0
    print(f"{out}: {'written' if written else f'already there; `convneur data verify {out}` checks every byte'}")
    return 0


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk, or a folder that can't be made, as one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error}: see to it and run the command again, it goes on where it stopped") from None
