"""A run that is started again by the same words begins where they say, and goes on by itself."""

from pathlib import Path

import pytest

from convneur.data.errors import InputError
from convneur.records.folder import BEGINNING_FILE
from convneur.run.resume import agreed_start, check_beginning
from convneur.system.world import World


def checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.mark.parametrize("begin", ["other/checkpoints/step-00000007", "other", "never"])
def test_path_is_where_a_run_begins_and_auto_is_how_it_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    monkeypatch.chdir(tmp_path)
    other, run = checkpoint(Path("other"), 7), Path("runs/new")
    run.mkdir(parents=True)
    (run / "attempts.jsonl").touch()
    assert agreed_start(run, begin, world) == begin
    assert agreed_start(run, begin, world) == begin  # it has failed before its first checkpoint
    checkpoint(run, 9)
    (other / "manifest.json").unlink()
    assert agreed_start(run, begin, world) == "auto"  # whatever has become of the other
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"^runs/new has checkpoints already, .*another --run.name"):
        check_beginning(run, "elsewhere")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_with_checkpoints_or_a_beginning_that_is_not_there_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "old", 3)
    for begin in ("never", str(tmp_path / "old")):
        with pytest.raises(InputError, match="has checkpoints already"):
            check_beginning(tmp_path / "old", begin)
    with pytest.raises(InputError, match="no checkpoint in"):
        check_beginning(tmp_path / "new", str(tmp_path / "nowhere"))
    assert not (tmp_path / "new" / BEGINNING_FILE).exists()
