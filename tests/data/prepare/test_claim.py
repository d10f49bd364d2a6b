"""Folders that one process at a time prepares a dataset in."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from refusals import input_error

from convneur.data.prepare import claim
from convneur.data.prepare.claim import LOCK, claimed, folder_locked


def _hold(folder: Path, ready: object) -> None:
    with claimed(folder, "digits"):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_a_folder_that_is_being_prepared_is_refused_until_its_holder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.1)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    ready.wait()
    assert f"another process is preparing {tmp_path}" in input_error(lambda: claimed(tmp_path, "digits").__enter__())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / LOCK).exists()
    with claimed(tmp_path, "digits") as fresh:
        assert fresh
    assert not (tmp_path / LOCK).exists()
    with folder_locked(tmp_path, shared=True), folder_locked(tmp_path, shared=True):
        input_error(lambda: claimed(tmp_path, "digits").__enter__())
    assert not (tmp_path / LOCK).exists()
