"""Shards, and a server that has them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_server import Server, serve, silence

from convneur.data.prepare.synthetic import prepare_synthetic


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of eight small JPEGs to train on, one of six to evaluate on."""
    folder = tmp_path_factory.mktemp("origin") / "data"
    prepare_synthetic(folder, classes=4, images=64, height=40, width=50, processes=1, shard_samples=8)
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convneur.data.stores.retry.DELAYS", (0.01, 0.01, 0.01))
    monkeypatch.setattr("convneur.data.stores.remote.STALL_SECONDS", 10)  # a busy machine's server isn't silent


@pytest.fixture(autouse=True)
def noticing_silence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "fault" in request.fixturenames and request.getfixturevalue("fault") is silence:
        request.getfixturevalue("impatient")
        monkeypatch.setattr("convneur.data.stores.remote.STALL_SECONDS", 0.3)


@pytest.fixture
def server(origin: Path, impatient: None) -> Iterator[Server]:
    with serve(origin) as server:
        yield server
