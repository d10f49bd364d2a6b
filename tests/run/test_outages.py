"""Storage that doesn't answer is told apart from bad input, wherever it shows."""

import errno
from pathlib import Path

import pytest

from convneur.data.errors import OUTAGE_STATUS, InputError, StorageError
from convneur.data.stores import retry
from convneur.errors import SaveError
from convneur.launch.cli import main
from convneur.launch.supervisor import run_files


def test_supervisor_and_command_line_agree_on_the_status() -> None:
    assert run_files.STORAGE == OUTAGE_STATUS not in (0, 1, run_files.BAD_INPUT, run_files.HANG)


@pytest.mark.parametrize("kind", [InputError, SaveError, OSError])
@pytest.mark.parametrize(("number", "expected"), [(errno.ESTALE, OUTAGE_STATUS), (errno.ENOENT, None)])
def test_what_storage_causes_ends_in_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[Exception],
    number: int,
    expected: int,
) -> None:
    def fails(*_: object) -> int:
        if kind is OSError:
            raise OSError(number, "no answer", "/data/index")
        try:
            raise OSError(number, "no answer")
        except OSError:
            raise kind("it can't be read") from None

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("convneur.launch.commands.doctor.run", fails)
    if kind is OSError and not expected:
        with pytest.raises(FileNotFoundError):
            main(["doctor"])
        return
    assert main(["doctor"]) == (expected or (2 if kind is InputError else 1))
    assert capsys.readouterr().err.count("\n") == 1


def test_patience_at_its_end_is_no_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retry, "DELAYS", (0.0,))
    with pytest.raises(StorageError, match="see to the disk or the server"):
        retry.retrying((tmp_path / "gone").read_bytes, "gone", OSError)
