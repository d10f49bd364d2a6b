"""The input path's C++ where there is no compiler."""

from pathlib import Path

import pytest

from convneur.data.native import SOURCES


def test_without_a_compiler_it_is_said_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="several times slower: there is no C\\+\\+ compiler 'no-such-compiler'"):
        assert SOURCES.load() is None
