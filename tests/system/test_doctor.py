"""`convneur doctor`: what is there, what isn't, and what that costs."""

import json
import os
import re
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import ROOT

from convneur.data import native
from convneur.launch.cli import main
from convneur.system.apex import examine_apex
from convneur.system.doctor import (
    REQUIRED_PACKAGES,
    Package,
    _examine_tool,
    _survived,
    examine_input,
    examine_package,
    examine_slurm,
    is_healthy,
)
from convneur.system.finding import Finding


def test_json_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    found = {component["name"]: component for component in report["components"]}
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == {
        "group": "packages",
        "name": "torch",
        "status": "ok",
        "version": metadata.version("torch"),
        "note": "",
        "required": True,
    }
    for name in ("torchvision", "timm", "deepspeed", "webdataset", "simplejpeg", "submitit"):
        assert found[name]["status"] == "ok"
        assert found[name]["version"] == metadata.version(name)
    assert {"ffcv", "apex", "CPU", "NCCL", "slurm", "g++", "nvcc", "ninja"} <= found.keys()
    assert all(component["note"] for component in found.values() if component["status"] != "ok")
    assert not any("\n" in component["note"] for component in found.values())


def test_table_names_every_component(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert all(package.distribution in output for package in REQUIRED_PACKAGES)
    assert output.endswith("all that is required works\n")


def test_without_a_compiler_the_input_path_says_what_that_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        found = examine_input()
    finally:
        native.library.cache_clear()
    assert found.status == "missing"
    assert "several times slower, to the same bits: there is no C++ compiler 'no-such-compiler'" in found.note
    assert not found.required


def test_other_libraries_than_it_was_written_after_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convneur.data.native.view.can_show", lambda how: how == "area")
    found = examine_input()
    assert found.status == "wrong"
    assert "data.interpolation bicubic, data.interpolation bilinear: Pillow" in found.note


def test_every_requirement_is_looked_at() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = setup["options"]["install_requires"].split("\n")
    needed = {Requirement(text).name for text in requirements if text}
    assert needed == {package.distribution for package in REQUIRED_PACKAGES}


def test_absent_package() -> None:
    assert examine_package(Package("convneur-absent", "absent", "no tea"), required=True) == Finding(
        "packages", "convneur-absent", "missing", None, "no tea; pip install convneur-absent", required=True
    )


def test_installed_package_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("raise RuntimeError('operator torchvision::nms\\n does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = examine_package(Package("rich", "half_installed", "no tea"), required=True)
    assert (finding.status, finding.version) == ("broken", metadata.version("rich"))
    assert finding.note == "no tea: RuntimeError: operator torchvision::nms does not exist"
    assert not is_healthy([finding])


def test_what_ends_the_interpreter_or_says_nonsense_hides_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "ninja").write_text("#!/bin/sh\nprintf '\\377 1.2.3\\n'\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = examine_package(Package("rich", "leaves", "no tea"), required=True)
    assert (finding.status, finding.note) == ("broken", "no tea: SystemExit: 3")
    assert _examine_tool("compilers", "ninja", "slow").version == "1.2.3"

    def fails() -> Finding:
        raise ValueError("apex.__spec__ is\nNone")

    assert _survived("packages", "apex", fails) == Finding(
        "packages", "apex", "broken", None, "ValueError: apex.__spec__ is None"
    )


def test_only_what_is_required_makes_a_machine_unfit() -> None:
    assert is_healthy([Finding("packages", "ffcv", "missing", None, "slower")])
    assert not is_healthy([Finding("packages", "torch", "missing", None, "nothing", required=True)])


@pytest.mark.parametrize(
    ("files", "status", "note"),
    [
        ((), "missing", "no fused optimizers"),
        (("apex/__init__.py", "apex/forms.py"), "wrong", "another package has this name; .* pip uninstall apex, then"),
        (("apex/__init__.py", "apex/optimizers/__init__.py"), "broken", "built without CUDA extensions: "),
        (("apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"), "ok", "$"),
    ],
)
def test_apex_is_told_from_its_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], status: str, note: str
) -> None:
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = examine_apex()
    assert finding.status == status
    assert re.match(note, finding.note)


@pytest.mark.parametrize(
    ("programs", "status", "note"),
    [
        ({}, "missing", "no jobs can be submitted from here; local training needs none"),
        ({"sinfo": "exit 0"}, "broken", "sbatch, srun not found: no jobs can be submitted from here"),
        ({"sbatch": "", "srun": "", "sinfo": "echo slurm-wlm 22.05.8"}, "ok", ""),
        (
            {"sbatch": "", "srun": "", "sinfo": '[ "$1" = --version ] && echo slurm-wlm 22.05.8'},
            "broken",
            "sinfo lists no partition: no jobs can be submitted from here",
        ),
    ],
)
def test_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], status: str, note: str
) -> None:
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = examine_slurm()
    assert (finding.status, finding.note) == (status, note)
    assert finding.version == ("slurm-wlm 22.05.8" if len(programs) == 3 else None)
