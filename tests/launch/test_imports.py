"""Imports without searches for garbage."""

import gc

from convneur.launch.imports import importing


def test_no_garbage_is_looked_for_meanwhile_whatever_happens() -> None:
    imports = importing()
    imports.__enter__()
    assert not gc.isenabled()
    assert not imports.__exit__(ImportError, ImportError("no such module"), None)  # which goes on
    assert gc.isenabled()
