"""The command line: words to arguments, and errors to one line."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from convneur.data.errors import InputError
from convneur.errors import NonFiniteError
from convneur.launch import commands
from convneur.launch.commands import Command


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 2 for bad input, 1 for training that can't go on."""
    try:
        words, overrides = _split_overrides(sys.argv[1:] if words is None else words)
        args, unknown = _parser().parse_known_args(words)
        if unknown:
            raise _unknown(unknown[0], args)
        if overrides and not args.takes_overrides:
            raise InputError(f"{overrides[0]} is a configuration key, and `convneur {args.command}` takes none")
        command: Command = args.run
        return command(args, overrides)
    except (InputError, NonFiniteError) as error:
        if "RANK" not in os.environ or not _report(error):
            print(f"convneur: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130


def _unknown(word: str, args: argparse.Namespace) -> InputError:
    """Says which flag was probably meant: one of the command, or a configuration key without its section."""
    from convneur.config import config_keys, nearest_key

    if not word.startswith("--"):
        return InputError(f"{word!r} belongs to no flag; see `convneur {args.command} --help`")
    flags = re.findall(r"--([\w-]+)", args.parser.format_usage())
    flags += config_keys() if args.takes_overrides else ()
    nearest = nearest_key(word[2:].partition("=")[0], flags)
    hint = f"did you mean --{nearest}?" if nearest else f"see `convneur {args.command} --help`"
    return InputError(f"{word} is not a flag of `convneur {args.command}`; {hint}")


def _report(error: Exception) -> bool:
    from convneur.launch.local import report_failure

    return report_failure(error)


class _TrainHelp(argparse.Action):
    """Shows the flags of `convneur train`, then every configuration key."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Prints, and exits."""
        from convneur.launch.key_help import key_help

        print(f"{parser.format_help()}\nconfiguration keys, in a file or as flags:\n\n{key_help()}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Reports mistakes in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{message}; see `{self.prog} --help`")


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets configuration overrides, which are the flags with a dot, apart from the words that argparse knows."""
    rest, overrides = [], []
    remaining = iter(words)
    for word in remaining:
        flag, equals, _ = word.partition("=")
        if flag != "--deepspeed" and not (flag.startswith("--") and "." in flag):
            rest.append(word)
            continue
        overrides.append(word)
        if not equals:
            overrides.extend(value for value in [next(remaining, None)] if value is not None)
    return rest, overrides


def _parser() -> _Parser:
    parser = _Parser(
        prog="convneur", description="Distributed training of ConvNeur vision backbones.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, summary: str, takes_overrides: bool = False, **kwargs: Any) -> _Parser:
        command: _Parser = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False, **kwargs)
        command.set_defaults(run=run, takes_overrides=takes_overrides, parser=command)
        return command

    prepare = add("prepare", commands.prepare, "Write a dataset as WebDataset shards.")
    prepare.add_argument("dataset", choices=["digits"], help="scanned handwritten digits that ship with scikit-learn")
    prepare.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")

    train = add(
        "train",
        commands.train,
        "Train a model; see below for the configuration keys.",
        takes_overrides=True,
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_TrainHelp, help="show this help and exit")
    train.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file; of several, later ones win"
    )
    _add_launch(train)
    train.add_argument(
        "--resume",
        default="never",
        metavar="never|auto|PATH",
        help="never: a new run, in a new folder (default); auto: go on with the run of this name if there is one;"
        " PATH: a new run from that checkpoint, or from another run's newest",
    )
    train.add_argument(
        "--check", type=int, metavar="RANKS", help="only check configuration and data, for a run of that many ranks"
    )
    train.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)  # how a launcher tells its ranks the folder

    evaluate = add("eval", commands.evaluate, "Measure a checkpoint's accuracy.")
    evaluate.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN", help="folder of a checkpoint, or of a run")
    evaluate.add_argument("--data", metavar="DIR", help="prepared dataset (default: the run's own)")
    evaluate.add_argument("--split", help="split of the dataset (default: the run's own)")
    weights = evaluate.add_mutually_exclusive_group()
    weights.add_argument("--raw", action="store_true", help="evaluate the weights as trained (default)")
    weights.add_argument("--ema", action="store_true", help="evaluate their moving average")
    _add_launch(evaluate)
    _add_json(evaluate)

    ablate = add(
        "ablate",
        commands.ablate,
        "Train every row of the paper's ablation table by one recipe; takes --section.key VALUE.",
        takes_overrides=True,
    )
    ablate.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file; of several, later ones win"
    )
    ablate.add_argument(
        "--dry-run", action="store_true", help="print parameters, operations and latency; train nothing"
    )
    _add_launch(ablate)

    info = add(
        "info",
        commands.info,
        "Show a variant's parameters, operations and stages; takes --model.KEY VALUE.",
        takes_overrides=True,
    )
    info.add_argument("variant", help="n1 to n3, m1 to m9")
    info.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="side of the image (default: 224)")
    _add_json(info)

    doctor = add("doctor", commands.doctor, "Show what this machine has, and what each missing part costs.")
    _add_json(doctor)
    return parser


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launch",
        choices=["auto", "local", "env"],
        default="auto",
        help="local: start processes on this machine; env: be the process that RANK, LOCAL_RANK, WORLD_SIZE,"
        " MASTER_ADDR and MASTER_PORT describe; auto: env where RANK is set, else local (default)",
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="processes to start (default: one a GPU, or one)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
