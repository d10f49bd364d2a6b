"""Imports point one way: convneur.launch -> convneur -> convneur.data."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Source folder -> (its package, what of the project it may import). setup.cfg's package_dir holds the same mapping.
ROOMS = {
    "data": ("convneur.data", ("convneur.data",)),
    "convneur": ("convneur", ("convneur.data", "convneur")),
    "launch": ("convneur.launch", ("convneur.data", "convneur", "convneur.launch")),
}
PACKAGES = [package for package, _ in ROOMS.values()]


def room_of(module: str) -> str | None:
    """The innermost package of the project that `module` belongs to; None where it is somebody else's."""
    inside = [package for package in PACKAGES if f"{module}.".startswith(f"{package}.")]
    return max(inside, key=len, default=None)


def imported_modules(source: str, package: str) -> Iterator[str]:
    """The absolute name of everything that a module of `package` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from convneur import launch` imports the package convneur.launch.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def forbidden_imports(source: str, package: str, allowed: tuple[str, ...]) -> list[str]:
    rooms = {module: room_of(module) for module in imported_modules(source, package)}
    return [module for module, room in rooms.items() if room is not None and room not in allowed]


@pytest.mark.parametrize("folder", ROOMS)
def test_imports_point_one_way(folder: str) -> None:
    package, allowed = ROOMS[folder]
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    offences = {
        str(path.relative_to(ROOT)): modules
        for path in sources
        if (modules := forbidden_imports(path.read_text(), package, allowed))
    }
    assert not offences


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
    ],
)
def test_a_wrong_way_is_seen(line: str) -> None:
    assert forbidden_imports(line, "convneur", ROOMS["convneur"][1])


def test_data_imports_nothing_of_the_project() -> None:
    allowed = ROOMS["data"][1]
    assert forbidden_imports("from convneur.models.convneur.model import ConvNeur", "convneur.data", allowed)
    assert forbidden_imports("from .. import model", "convneur.data", allowed)
    assert not forbidden_imports("from convneur.data.errors import InputError", "convneur.data", allowed)
    assert not forbidden_imports("from . import errors", "convneur.data", allowed)
