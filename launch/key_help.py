"""Help for every configuration key, from the dataclasses' types, defaults and docstrings."""

import argparse

from jsonargparse import SUPPRESS, ArgumentParser, DefaultHelpFormatter

from convneur.config import Config
from convneur.settings import config_keys


class _KeysOnly(DefaultHelpFormatter):
    """Leaves out the sections themselves, which jsonargparse would also take as flags."""

    def add_argument(self, action: argparse.Action) -> None:
        """Adds an argument's help if it is a key with a value."""
        if not any(key.startswith(f"{action.dest}.") for key in config_keys(Config)):
            super().add_argument(action)


def key_help() -> str:
    """A paragraph a section, an entry a key."""
    parser = ArgumentParser(usage=SUPPRESS, add_help=False, formatter_class=_KeysOnly)
    parser.add_class_arguments(Config)
    return parser.format_help()
