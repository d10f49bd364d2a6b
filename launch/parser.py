"""Words of a command line that are no configuration keys: what they may be, and errors in one line."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from convneur.data.errors import InputError

MOST = 2**31 - 1

Overrides = Sequence[str]
"""Configuration keys and their values, as the command line has them."""
Command = Callable[[argparse.Namespace, Overrides], int]
"""What a command does with its flags, among them `words`, all of them as they were; returns the exit status."""


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        if of_value := re.fullmatch(r"argument ([^:]+): (is .*)", message, re.DOTALL):
            raise InputError(f"{of_value[1]} {of_value[2]}")
        raise InputError(f"{message}; see `{self.prog} --help`")


# What commands, or the actions of one of them, are added to. At run time argparse's class takes no type.
if TYPE_CHECKING:
    Parsers = argparse._SubParsersAction[Parser]
else:
    Parsers = argparse._SubParsersAction


def add_command(
    parsers: Parsers, name: str, run: Command, summary: str, takes_overrides: bool = False, **kwargs: Any
) -> Parser:
    """Adds a command, or an action of one, and returns the parser of its flags."""
    command = parsers.add_parser(name, help=summary, description=summary, allow_abbrev=False, **kwargs)
    full_name = command.prog.partition(" ")[2]
    command.set_defaults(run=run, takes_overrides=takes_overrides, parser=command, command=full_name)
    return command


def add_group(parsers: Parsers, name: str, summary: str, *, dest: str) -> Parsers:
    """Adds a command that has actions of its own, and returns what they are added to; `dest` names them in the help."""
    group = parsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    return group.add_subparsers(dest=dest, required=True, metavar=dest.upper())


def whole(least: int, most: int = MOST, what: str = "") -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` to `most`; `what` says what they are."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most:,}"
            raise argparse.ArgumentTypeError(f"is {text}, expected {what}{bound}")
        return value

    number.__name__ = "int"  # argparse names it where a text is none
    return number


def positive(most: float) -> Callable[[str], float]:
    """A type of arguments: numbers above 0, and at most `most`."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"is {text}, expected a number above 0 and at most {most:g}")
        return value

    number.__name__ = "float"
    return number


def printable(text: str) -> str:
    """A text as it is, with what would break its line, or act on a terminal, in escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def check_words(words: list[str], prog: str) -> None:
    """Raises InputError where a word, or the value of a flag, is empty: a variable of a shell that isn't set."""
    for before, word in zip([prog, *words], words, strict=False):
        flag = before if not word else word[:-1] if re.fullmatch(r"--[\w-]+=", word) else None
        if flag is not None:
            raise InputError(
                f"{'what follows ' * (flag == before)}{flag} is empty, expected a value; is a variable unset?"
            )


COUNT = whole(1)
RANKS = whole(1, what="the number of ranks, ")
PROCESSES = whole(1, 4096)  # of one machine
TASKS = whole(1, 4_000_000)  # the largest array that Slurm can be set to take
PIXELS = whole(1, 1 << 16)  # a side of an image, in JPEG
