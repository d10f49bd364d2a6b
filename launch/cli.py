"""The command line: words to arguments, and errors to one line."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

from convneur.data.errors import OUTAGE_STATUS, InputError, StorageError, WorkerError, is_outage
from convneur.data.stores.addresses import redact
from convneur.errors import TrainingError
from convneur.launch.commands import (
    ablate,
    bench,
    data,
    doctor,
    evaluate,
    explain,
    export,
    info,
    plan,
    plot,
    prepare,
    runs,
    study,
    submit,
    train,
)
from convneur.launch.parser import Command, Parser, check_words, printable
from convneur.launch.signals import StoppedError
from convneur.launch.streams import close_output, escape_output

DENIED = {errno.EACCES, errno.EPERM}
ENVIRONMENT = DENIED | {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What anything that reads and writes may meet: another user's files, a disk that is full or read-only, a quota."""

COMMANDS = (
    prepare,
    data,
    train,
    submit,
    runs,
    evaluate,
    export,
    explain,
    plot,
    ablate,
    study,
    plan,
    bench,
    info,
    doctor,
)
"""The commands, in the order of the help."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 2 for bad input, 1 for training that can't go on.

    It is 74 where storage or a server doesn't answer.
    """
    escape_output()
    status = _run(words)
    lost = close_output(quiet=status != 0)
    return status or lost


def _run(words: Sequence[str] | None) -> int:
    try:
        words, overrides = _split_overrides(sys.argv[1:] if words is None else words)
        check_words(words, "convneur")
        args, unknown = _parser().parse_known_args(words, argparse.Namespace(words=words))
        if unknown:
            raise _unknown(unknown[0], args)
        if overrides and not args.takes_overrides:
            raise InputError(f"{overrides[0]} is a configuration key, and `convneur {args.command}` takes none")
        command: Command = args.run
        return _call(command, args, overrides)
    except (InputError, TrainingError, WorkerError) as error:
        _say(error)
        return exit_status(error)
    except BrokenPipeError:
        return 1  # nobody reads what is printed any more
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        what = "used" if error.errno in DENIED else "written"
        where = f"{error.filename} can't be {what}: " if error.filename else ""
        _say(TrainingError(f"{where}{error.strerror}"))
        return 1
    except StoppedError as error:
        _say(TrainingError(f"{error} before anything was begun; there was nothing to save"))
        return error.status
    except KeyboardInterrupt:
        return 130


def exit_status(error: Exception) -> int:
    """What a process ends with that can't go on for this reason."""
    return OUTAGE_STATUS if isinstance(error, StorageError) else 2 if isinstance(error, InputError) else 1


def _parser() -> Parser:
    parser = Parser(
        prog="convneur", description="Distributed training of ConvNeur vision backbones.", allow_abbrev=False
    )
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(parsers)
    return parser


def _call(command: Command, args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs a command; what fails because storage doesn't answer, however that shows, is a StorageError."""
    try:
        return command(args, overrides)
    except (InputError, TrainingError, OSError) as error:
        if is_outage(error) and not isinstance(error, StorageError):
            raise StorageError(f"{error}: the storage doesn't answer; see to it, then resume") from error
        raise


def _unknown(word: str, args: argparse.Namespace) -> InputError:
    """Says which flag was probably meant: one of the command, or a configuration key without its section."""
    from convneur.config import Config
    from convneur.settings import config_keys, nearest_key

    if not word.startswith("--"):
        return InputError(f"{word!r} belongs to no flag; see `convneur {args.command} --help`")
    flags = re.findall(r"--([\w-]+)", args.parser.format_usage())
    if args.takes_overrides:
        flags += (key for key in config_keys(Config) if "." in key)  # the sections themselves are no flags
    nearest = nearest_key(word[2:].partition("=")[0], flags)
    hint = f"did you mean --{nearest}?" if nearest else f"see `convneur {args.command} --help`"
    return InputError(f"{word} is not a flag of `convneur {args.command}`; {hint}")


def _say(error: Exception) -> None:
    """Prints an error, or leaves it to the launcher, if there is one, to print that once for all ranks."""
    line = redact(printable(str(error)))
    if "RANK" in os.environ:
        from convneur.launch.local import report_failure

        if report_failure(type(error)(line)):
            return
    with suppress(OSError):
        print(f"convneur: error: {line}", file=sys.stderr)


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
