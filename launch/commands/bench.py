"""`convneur bench`: measures on this machine what `convneur plan` has to guess."""

import argparse
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from convneur.launch.flags import add_config, add_json, add_processes, asked_processes
from convneur.launch.parser import COUNT, Overrides, Parsers, add_command, add_group
from convneur.records.json_files import json_text

IMAGES = 4000


def add(parsers: Parsers) -> None:
    """Adds the command, with its action."""
    actions = add_group(parsers, "bench", "Measure on this machine what `convneur plan` has to guess.", dest="action")
    command = add_command(
        actions,
        "data",
        data,
        "Measure how many images a core decodes and augments, for `convneur plan`; takes configuration keys.",
        takes_overrides=True,
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="prepared dataset")
    add_config(command)
    command.add_argument("--images", type=COUNT, metavar="N", help="how many to measure (default: 4,000 a process)")
    add_processes(command)
    add_json(command)


def data(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur bench data`: images a second and core, with as many decoding processes as there are processors."""
    from convneur.config import load_config
    from convneur.data.inspect.speed import measure_speed
    from convneur.data.prepare.progress import progress
    from convneur.limits import check_values
    from convneur.planning.rates import rates_file, record_rate

    config = load_config(args.config, [*overrides, "--data.root", str(args.folder)])
    check_values(config)
    workers = asked_processes(args)
    images = args.images or IMAGES * workers
    shown = nullcontext(lambda _: None) if args.json else progress("measuring", images, "images")
    with shown as advance:
        measured = measure_speed(replace(config.data, workers=workers), images, config.run.seed, advance)
    rate = record_rate(config.data, measured.per_core)
    if args.json:
        print(json_text({**asdict(rate), **asdict(measured)}, indent=2))
        return 0
    print(
        f"{rate.per_core:,.0f} images a second and core on {rate.cpu}: {measured.images:,} images in"
        f" {measured.seconds:.1f} s by {workers} processes, {measured.processor_seconds:.1f} s of processors;"
        f" {config.data.interpolation}, {config.data.augment.randaugment or 'no RandAugment'}"
    )
    print(f"{rates_file()}: convneur plan reckons with it")
    return 0
