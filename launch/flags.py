"""Flags that several commands take, each with what reads it."""

import argparse
import re
from typing import TYPE_CHECKING

from convneur.data.errors import InputError
from convneur.launch.parser import COUNT, PROCESSES, whole

if TYPE_CHECKING:
    from convneur.data.prepare.writing import Part
    from convneur.launch.submit import Resources
    from convneur.planning.forecast import Cluster


def add_config(parser: argparse.ArgumentParser, help: str = "YAML file; of several, later ones win") -> None:
    """Adds --config."""
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help=help)


def add_json(parser: argparse.ArgumentParser, help: str = "print JSON") -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help=help)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds --raw and --ema."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--raw", action="store_true", help="take the weights as trained (default)")
    weights.add_argument("--ema", action="store_true", help="take their moving average")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Adds --launch and --nproc; `convneur.launch.rank` reads the first, `convneur.launch.local` the second."""
    parser.add_argument(
        "--launch",
        choices=["auto", "local", "env"],
        default="auto",
        help="local: start processes on this machine; env: be the process that RANK, LOCAL_RANK, WORLD_SIZE,"
        " MASTER_ADDR and MASTER_PORT describe; auto: env where RANK is set, else local (default)",
    )
    parser.add_argument("--nproc", type=PROCESSES, metavar="N", help="processes to start (default: one a GPU, or one)")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds --processes."""
    parser.add_argument(
        "--processes", type=PROCESSES, metavar="N", help="how many at a time (default: one a processor)"
    )


def asked_processes(args: argparse.Namespace) -> int:
    """How many to run at a time."""
    from convneur.data.prepare.parallel import processors

    return processors() if args.processes is None else int(args.processes)


def add_part(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds --part."""
    parser.add_argument("--part", metavar="I/N", help=help)


def asked_part(args: argparse.Namespace) -> "Part | None":
    """Which part of the work is asked for; None for all of it. InputError where --part names none."""
    from convneur.data.prepare.writing import Part

    if args.part is None:
        return None
    number, _, of = args.part.partition("/")
    if not (is_count(number) and is_count(of) and 1 <= int(number) <= int(of)):
        raise InputError(f"--part is {args.part}, expected I/N with I from 1 to N, such as 3/64")
    return Part(int(number), int(of))


def is_count(text: str) -> bool:
    """Whether a part of a flag's value is a number of things."""
    return text.isdecimal() and len(text) < 10


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """Adds --gpu."""
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME|FILE",
        help="GPU to plan for, such as h200, or a YAML file that describes one (default: h100)",
    )


def asked_cluster(args: argparse.Namespace) -> "Cluster":
    """The machines that --nodes, --gpus-per-node and --gpu name."""
    from convneur.planning.forecast import Cluster
    from convneur.system.gpu import load_gpu

    return Cluster(load_gpu(args.gpu), args.nodes, args.gpus_per_node)


def add_resources(parser: "argparse._ActionsContainer") -> None:
    """Adds what a job of Slurm asks for."""
    parser.add_argument("--nodes", type=COUNT, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=whole(0), default=8, metavar="N", help="GPUs of a node (default: 8)")
    parser.add_argument("--tasks-per-node", type=COUNT, metavar="N", help="ranks a node (default: one a GPU, or one)")
    parser.add_argument("--cpus-per-task", type=COUNT, default=12, metavar="N", help="CPUs a rank (default: 12)")
    parser.add_argument(
        "--timeout-min", type=COUNT, default=1440, metavar="M", help="minutes of a time slice (default: 1440)"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="another option of sbatch, without --"
    )


def asked_resources(args: argparse.Namespace, at_once: int | None = None) -> "Resources":
    """What a job asks for; `at_once` tasks of an array at a time, if that is given. InputError for a bad --sbatch."""
    from convneur.launch.submit import Resources

    tasks = args.tasks_per_node or max(1, args.gpus_per_node)
    for option in args.sbatch:
        if not re.fullmatch(r"[A-Za-z][\w-]*(=[^\n\r]*)?", option):
            raise InputError(f"--sbatch is {option!r}, expected OPTION=VALUE of sbatch, without --, on one line")
    options = dict(option.partition("=")[::2] for option in args.sbatch)
    return Resources(args.nodes, args.gpus_per_node, tasks, args.cpus_per_task, args.timeout_min, options, at_once)
