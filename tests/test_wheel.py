"""What a user installs: the wheel, in an environment where the checkout and its editable install can't be seen."""

import configparser
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from places import ROOT

ROOMS = {"convneur": "convneur", "data": "convneur.data", "launch": "convneur.launch"}  # source folder -> package

OPTIONAL = {"convneur.data.stream.ffcv": "ffcv"}  # module -> a package that it can't be imported without

IMPORT_ALL = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])}))
"""


def modules_in_source() -> set[str]:
    """Every module that the source folders hold, whether setup.cfg knows its folder or not."""
    names = set()
    for folder, package in ROOMS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.add(".".join([package, *(part for part in parts if part != "__init__")]))
    return names - {name for name in names if name.endswith(".__main__")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the present sources. Built from a copy: setuptools would take stale modules from a `build` folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ROOMS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source]
    subprocess.run([sys.executable, *build], check=True)
    (path,) = out.glob("convneur-*.whl")
    return path


def test_top_level_and_type_marker(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"convneur"}
    sources = {
        f"{package}/native/{path.name}"
        for package, folder in (("convneur/ops", "convneur/ops"), ("convneur/data", "data"))
        for path in (ROOT / folder / "native").iterdir()
        if path.is_file()
    }
    assert {"convneur/ops/native/memory.cpp", "convneur/data/native/view.cpp"} <= sources
    assert {"convneur/py.typed", *sources} <= {*names}
    assert any(name.endswith("/LICENSE") for name in names)


def test_every_module_imports_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    target = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    install = ["-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], check=True)
    # A folder named in a .pth file goes on the path as it is: the .pth files in it, among them that of the editable
    # install, are not read.
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # -I: no PYTHONPATH, no current folder.
        return subprocess.run([python, "-I", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=1200)

    modules = modules_in_source()
    modules -= {name for name, package in OPTIONAL.items() if importlib.util.find_spec(package) is None}
    assert {"convneur.models.convneur.model", "convneur.data.errors", "convneur.launch"} <= modules
    result = run("-c", IMPORT_ALL, json.dumps(sorted(modules)))
    assert result.returncode == 0, result.stderr
    files = json.loads(result.stdout.splitlines()[-1])
    assert [name for name, file in files.items() if not Path(file).is_relative_to(target)] == []

    # The environment is as empty as it claims: without the wheel nothing of the project is found.
    shutil.rmtree(target / "convneur")
    assert "No module named 'convneur'" in run("-c", "import convneur").stderr


def test_rooms_are_those_of_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    mapping = dict(line.split(" = ") for line in config["options"]["package_dir"].split("\n") if line)
    assert {folder: package for package, folder in mapping.items()} == ROOMS
    # A folder that setup.cfg forgets is in the checkout and missing in the wheel.
    inner = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in ROOMS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert {*config["options"]["packages"].split()} == {*mapping, *inner}
