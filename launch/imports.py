"""Imports that take seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Keeps Python from looking for garbage while modules are imported: it makes a sixth of the start of a process.

    What torch and all that comes with it consist of are a million objects that stay.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
