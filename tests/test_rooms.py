"""Every file lies in a room, rooms import only those above them, and neither files nor functions grow too long."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from places import ROOT

FOLDERS = {"convneur": "convneur", "data": "convneur.data", "launch": "convneur.launch"}  # source folder -> package
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


class Room(NamedTuple):
    """A line of the table.

    path: of the room's folder or its only file, from the root.
    imports: the rooms that it may import: "nothing", "all above", "all above but A, B", or their paths.
    """

    path: str
    purpose: str
    imports: str = "all above"


ROOMS = [
    Room("data/__init__.py", "says what the package is", "nothing"),
    Room("data/errors.py", "what every room can raise: bad input, damaged files, storage that doesn't answer"),
    Room("data/files.py", "files that are whole or absent"),
    Room("data/compiled.py", "C++ compiled for this processor when first used"),
    Room("data/keys.py", "random numbers as functions of a key"),
    Room("data/config.py", "the settings of the data"),
    Room("data/native", "the input path in C++: resizing, augmentation, JPEGs"),
    Room("data/format", "the files of a dataset: manifest, index, shards, classes, which samples"),
    Room("data/stores", "where a sample's bytes come from: tar files, .beton files, object stores, a cache"),
    Room("data/views", "from bytes to an image: decoding and augmentation"),
    Room("data/stream", "the order of samples, and the batches that workers make of them"),
    Room("data/check.py", "whether the settings fit the data, before anything is allocated"),
    Room("data/prepare", "writing datasets"),
    Room("data/inspect", "looking at datasets: verifying, showing samples"),
    Room("convneur/settings.py", "from YAML files and flags to any typed dataclass", "data/errors.py, data/files.py"),
    Room("convneur/errors.py", "what can go wrong in training", "nothing"),
    Room("convneur/ops", "functions of tensors, in PyTorch, C++ and Triton; they know no module and no settings"),
    Room("convneur/system", "what a run runs on: ranks, signals, determinism, GPUs and their data sheets, the doctor"),
    Room("convneur/models", "backbones: ConvNeur, its branches and variants, what a model costs"),
    Room("convneur/engine", "all that knows DeepSpeed: its section, engine, optimizer, averages, state by ZeRO stage"),
    Room("convneur/monitoring", "who looks on: guards, watchdog, gauges, profiler"),
    Room("convneur/config.py", "the settings of a run"),
    Room("convneur/tasks", "what is learned: losses, targets, scores", "all above but convneur/monitoring"),
    Room("convneur/records", "what a run leaves: checkpoints, metrics, summary, provenance, curves"),
    Room("convneur/limits.py", "what types can't say of the settings", "all above but convneur/records"),
    Room("convneur/planning", "what a run will take: memory, time, images a second"),
    Room("convneur/tools", "what becomes of a checkpoint: evaluation, export, maps", "all above but convneur/planning"),
    Room(
        "convneur/run",
        "a run from its start to its end: building, resuming, checkpoints, going back",
        "all above but convneur/planning, convneur/tools",
    ),
    Room("convneur/train.py", "the training step and the loop", "all above but convneur/planning, convneur/tools"),
    Room("convneur/studies", "many runs of ConvNeur that classify: ablations, scaling studies, their fits and reports"),
    Room("convneur/__init__.py", "tells timm the names of the variants", "convneur/models"),
    Room("launch/supervisor", "keeps the ranks of a job going; batch scripts run launch/supervise.py", "nothing"),
    Room("launch", "the command line, processes, runs, batch jobs"),
]

ALSO_MEASURED = ["benchmarks", "scripts", "slurm"]  # folders that are no rooms, and whose files stay small all the same
LONG = {
    "convneur/ops/memory/triton.py::_forward_kernel": "one loop over chunks; its parts share 20 pointers and tiles",
    "convneur/ops/memory/triton.py::_backward_kernel": "the same loop backwards, read against the forward one",
}
"""Files of more than 400 lines, and functions, as FILE::NAME, of more than 60, each with its reason."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """Its absolute name as it is imported; a package's is that of its folder."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in parts if part != "__init__")])


MODULES = {module_of(path): path.relative_to(ROOT).as_posix() for path in sources(*FOLDERS)}  # name -> file


def room_of(file: str) -> Room | None:
    """The room that a file lies in; None where the table has none."""
    return next((room for room in ROOMS if f"{file}/".startswith(f"{room.path}/")), None)


def importable(room: Room) -> set[str]:
    """The paths of the rooms that a room may import, itself included."""
    above = [other.path for other in ROOMS[: ROOMS.index(room)]]
    start, _, named = room.imports.partition("all above")
    if start == "nothing":
        return {room.path}
    names = {name for name in (start or named.removeprefix(" but ")).split(", ") if name}
    assert names <= {*above}, f"{room.path}: what of {names} is no room above it?"
    return {room.path, *(names if start else {*above} - names)}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute names of all that a module of `package` imports: at its top, in a function, by a string, for types."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from convneur import launch` imports the package convneur.launch.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def imported_files(source: str, package: str) -> set[str]:
    """The project's files that a module imports: of `from a import b` that of a.b, or of a where b is no module."""
    files = set()
    for name in imported_modules(source, package):
        if name != "convneur" and not name.startswith("convneur."):
            continue
        while name not in MODULES:
            name = name.rpartition(".")[0]
        files.add(MODULES[name])
    return files


def forbidden_imports(source: str, file: str, package: str) -> list[str]:
    room = room_of(file)
    assert room, file
    allowed = importable(room)
    imported = {other: room_of(other) for other in imported_files(source, package)}
    return sorted(other for other, its_room in imported.items() if its_room is None or its_room.path not in allowed)


def package_of(path: Path) -> str:
    return module_of(path.parent / "__init__.py")


def test_every_file_lies_in_a_room() -> None:
    assert not [file for file in MODULES.values() if room_of(file) is None]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.path)
def test_every_room_exists_and_has_a_purpose(room: Room) -> None:
    assert room in map(room_of, MODULES.values()), "no file lies there"
    assert room.purpose
    assert importable(room)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    offences = {
        (path.relative_to(ROOT).as_posix(), other)
        for path in sources(folder)
        for other in forbidden_imports(path.read_text(), path.relative_to(ROOT).as_posix(), package_of(path))
    }
    assert not offences


def test_no_modules_import_each_other() -> None:
    graph = {file: imported_files((ROOT / file).read_text(), package_of(ROOT / file)) for file in MODULES.values()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    "line",
    [
        "import convneur.launch",
        "import convneur.launch.cli as cli",
        "from convneur import launch",
        "from convneur.launch import cli",
        "from . import launch",
        "from .launch.cli import main",
        "def late():\n    from convneur.launch import cli",
        "if TYPE_CHECKING:\n    from convneur.launch.cli import main",
        "importlib.import_module('convneur.launch.cli')",
    ],
)
def test_a_wrong_way_is_seen(line: str) -> None:
    assert forbidden_imports(line, "convneur/train.py", "convneur")


def test_data_imports_nothing_of_the_project() -> None:
    file, package = "data/inspect/show.py", "convneur.data"
    assert forbidden_imports("from convneur.models.convneur.model import ConvNeur", file, package)
    assert forbidden_imports("from .. import train", file, package)
    assert not forbidden_imports("from convneur.data.errors import InputError", file, package)
    assert not forbidden_imports("from . import errors", file, package)


@pytest.mark.parametrize(
    ("file", "module", "allowed"),
    [
        ("data/files.py", "data.keys", False),
        ("data/stream/order.py", "data.stores.store", True),
        ("convneur/settings.py", "data.errors", True),
        ("convneur/settings.py", "data.config", False),
        ("convneur/ops/precision.py", "models.convneur.model", False),
        ("convneur/tasks/classification.py", "monitoring.guards", False),
        ("convneur/tasks/classification.py", "engine.optimizer", True),
        ("convneur/run/run.py", "tools.export", False),
        ("convneur/studies/grid.py", "train", True),
    ],
)
def test_rooms_are_told_apart(file: str, module: str, allowed: bool) -> None:
    assert bool(forbidden_imports(f"import convneur.{module}", file, "convneur")) != allowed


def too_long() -> set[str]:
    """Files, and functions as FILE::NAME, that are."""
    found = set()
    for path in sources(*FOLDERS, *ALSO_MEASURED):
        file, text = path.relative_to(ROOT).as_posix(), path.read_text()
        if text.count("\n") > LONGEST_FILE:
            found.add(file)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    found.add(f"{file}::{node.name}")
    return found


def test_files_and_functions_are_short_or_have_a_reason() -> None:
    assert not too_long() - {*LONG}
    assert not {*LONG} - too_long(), "no longer long"
    assert all(LONG.values())


def test_tests_lie_in_folders_of_the_rooms_names() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    names = {room.path.removeprefix("convneur/") for room in ROOMS if not room.path.endswith(".py")}
    # data's own files are rooms without a folder; slurm/ is no package; the supervisor is tested with launch
    assert folders - {".", "data", "slurm"} == names - {"launch/supervisor"}
    rooms = {f"test_{Path(room.path).stem}.py" for room in ROOMS if room.path.startswith("convneur/")}
    alone = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert alone - {"test_recipes.py", "test_rooms.py", "test_wheel.py"} <= rooms


def test_the_architecture_shows_the_table() -> None:
    head = "| room | what lives there | may import |\n|---|---|---|\n"
    table = head + "".join(f"| `{room.path}` | {room.purpose} | {room.imports} |\n" for room in ROOMS)
    assert table + "\n" in (ROOT / "docs" / "architecture.md").read_text(), f"expected there:\n{table}"
