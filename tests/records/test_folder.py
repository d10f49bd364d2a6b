"""Names of a run's files."""

import ast

import pytest
from places import ROOT

from convneur.launch.supervisor import run_files
from convneur.records import folder

NAMES = {name: value for name, value in vars(folder).items() if isinstance(value, str) and name.isupper()}
SUPERVISOR = ROOT / "launch" / "supervisor" / "run_files.py"


def spelled_in(source: str) -> set[str]:
    """Names of a run's files among the strings of a source; what is a word, such as "optimizer", doesn't count."""
    files = {value for value in NAMES.values() if "." in value or value.isupper()}
    return {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)} & files


@pytest.mark.parametrize("room", ["convneur", "launch"])
def test_a_runs_files_are_named_in_one_place(room: str) -> None:
    rest = {ROOT / "convneur" / "records" / "folder.py", SUPERVISOR}
    found = {path: spelled_in(path.read_text()) for path in {*(ROOT / room).rglob("*.py")} - rest}
    assert found
    for path, names in found.items():
        # What a command hands on to its ranks is in a temporary config.yaml.
        assert not names - ({folder.CONFIG_FILE} if path.parent.name == "commands" else set()), path


def test_a_name_spelled_elsewhere_is_seen() -> None:
    assert spelled_in('path = folder / "metrics.jsonl"\nnewest = "LATEST"') == {"metrics.jsonl", "LATEST"}


def test_the_supervisor_spells_them_alike() -> None:
    shared = {name: value for name, value in vars(run_files).items() if name in NAMES}
    assert shared == {name: NAMES[name] for name in ("ATTEMPTS_FILE", "SUMMARY_FILE")}
    names = {node.value for node in ast.walk(ast.parse(SUPERVISOR.read_text())) if isinstance(node, ast.Constant)}
    assert {folder.CHECKPOINTS, folder.MANIFEST} <= names
