"""Imports that take seconds."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Keeps Python from looking for garbage while modules are imported: it makes a sixth of the start of a process.

    What torch and all that comes with it consist of are a million objects that stay. In a process that has just
    started, where no garbage can be among them yet, they are not looked at again until its end.
    """
    starting = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if starting and "torch" in sys.modules:
            gc.freeze()
            atexit.register(gc.unfreeze)  # libraries in C++ count what is left when Python ends, and complain
        gc.enable()
