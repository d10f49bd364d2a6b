"""Damage to what describes a dataset: files of another size or version, and a manifest that says something else."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import input_error

from convneur.data.errors import InputError
from convneur.data.format.manifest import Manifest
from convneur.data.inspect.show import summarize
from convneur.data.inspect.verify import verify_dataset
from convneur.data.stores.tar import TarStore


def read_all(folder: Path) -> list[Callable[[], object]]:
    return [lambda: verify_dataset(folder, 1), lambda: TarStore(folder, "train"), lambda: summarize(folder)]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "train-000003.tar").unlink(), "train-000003.tar is missing"),
        (lambda folder: (folder / "train-000003.tar").write_bytes(b""), "train-000003.tar has 0 bytes"),
        (lambda folder: os.truncate(folder / "train-000003.tar", 5000), "train-000003.tar has 5000 bytes"),
        (lambda folder: shutil.copy(folder / "val.index.npy", folder / "train.index.npy"), "does not match"),
    ],
)
def test_files_that_are_missing_cut_off_or_of_another_version_are_refused(
    copy: Path, damage: object, expected: str
) -> None:
    damage(copy)
    manifest = (copy / "manifest.json").read_bytes()
    for read in (lambda: verify_dataset(copy, 2), lambda: TarStore(copy, "train")):
        with pytest.raises(InputError, match=expected) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert (copy / "manifest.json").read_bytes() == manifest


def test_a_manifest_of_another_version_is_refused(copy: Path) -> None:
    fields = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(fields | {"format": 2}))
    with pytest.raises(InputError, match="has format 2, not 1"):
        verify_dataset(copy, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_of_a_manifest_changes_what_it_says_in_silence(original: Path, data: st.DataObject) -> None:
    content = bytearray((original / "manifest.json").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(content)
        try:
            read = Manifest.read(Path(folder))
        except InputError:
            assert f"{folder}/manifest.json" in input_error(lambda: Manifest.read(Path(folder)))
        else:
            assert read == Manifest.read(original)


def _change(fields: dict[str, Any], *path: str | int, value: object) -> None:
    for step in path[:-1]:
        fields = fields[step]
    fields[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["classes"], ["c0000", "c0001", "c0002"], "has 3 classes, but split 'train' more"),
        (["classes", 1], 7, "the classes are no list of names"),
        (["classes"], "cats", "the classes are no list of names"),
        (["source"], None, "source is None"),
        (["splits", "train", "denied"], [{"row": 40, "key": "x", "reason": ""}], "denies samples that there are not"),
        (
            ["splits", "train", "denied"],
            [{"row": 10**30, "key": "x", "reason": ""}],
            "denies samples that there are not",
        ),
        (["splits", "train", "denied"], [{"row": -1, "key": "x", "reason": ""}], "denies samples that there are not"),
        (["splits", "train", "denied"], [{"row": 3, "key": "x", "reason": ""}], "denies samples of other names"),
        (["splits", "train", "denied"], [{"row": "3", "key": "x", "reason": ""}], "row is '3'"),
        (["splits", "train", "denied"], [{"row": 3, "key": "train00000003", "reason": ""}] * 2, "or twice"),
        (["splits", "train", "shards"], [], "lists other shards than its index"),
        (["splits", "train", "shards", 0, "size"], "9", "size is '9'"),
        (["splits", "train", "shards", 0, "size"], True, "size is True"),
        (["splits", "train"], None, "is damaged"),
        (["splits", "train", "index_crc32c"], 1, "train.index.npy does not match manifest.json"),
        (["has_shards"], "no", "has_shards is 'no'"),
        (["crc32d"], 1, "unknown key 'crc32d'"),
    ],
)
def test_an_old_manifest_that_contradicts_itself_is_refused(
    copy: Path, path: list[str | int], value: object, expected: str
) -> None:
    """As those without a checksum are still read."""
    fields = json.loads((copy / "manifest.json").read_text())
    del fields["crc32c"]
    (copy / "manifest.json").write_text(json.dumps(fields))
    assert len(TarStore(copy, "train")) == 40
    _change(fields, *path, value=value)
    (copy / "manifest.json").write_text(json.dumps(fields))
    message = input_error(lambda: TarStore(copy, "train"))
    assert expected in message
    assert str(copy) in message


def test_what_is_no_file_is_no_manifest(copy: Path) -> None:
    manifest = copy / "manifest.json"
    for spoil in (lambda: manifest.mkdir(), lambda: os.mkfifo(manifest), lambda: manifest.write_text("[" * 100_000)):
        manifest.unlink()
        spoil()
        for read in read_all(copy):
            assert f"{manifest} is damaged" in input_error(read)
        if manifest.is_dir():
            manifest.rmdir()
            manifest.touch()
