"""Small datasets that tests of several rooms read, or damage copies of."""

import shutil
from pathlib import Path

import pytest

from convneur.data.prepare.synthetic import prepare_synthetic


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training images in five shards, four to evaluate on."""
    folder = tmp_path_factory.mktemp("original") / "data"
    prepare_synthetic(folder, classes=4, images=40, height=30, width=40, processes=1, shard_samples=8)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A copy of `original` that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "data"))
