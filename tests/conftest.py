from pathlib import Path

import pytest

from convneur.data.digits import prepare_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared digits; tests that change files copy them."""
    folder = tmp_path_factory.mktemp("datasets") / "digits"
    prepare_digits(folder)
    return folder
