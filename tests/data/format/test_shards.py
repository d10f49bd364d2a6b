"""Files, shards, their index and the store over them, on the digits and on damaged copies of them."""

import io
import json
import os
import pickle
import shutil
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from refusals import input_error
from sklearn.datasets import load_digits

from convneur.data.files import TEMPORARY, atomic_write
from convneur.data.format.index import index_split
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.prepare.digits import prepare_digits
from convneur.data.stores.tar import OPEN_SHARDS, TarStore


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may damage."""
    return Path(shutil.copytree(digits, tmp_path / "digits"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_atomic_write_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"first")
    with pytest.raises(UnicodeEncodeError), atomic_write(path) as file:
        file.write(b"second" + "\ud800".encode())
    assert contents(tmp_path) == {"file": b"first"}
    with atomic_write(path) as file:
        file.write(b"third")
        assert path.read_bytes() == b"first"
        assert len(list(tmp_path.glob(TEMPORARY))) == 1
    assert contents(tmp_path) == {"file": b"third"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_digits_are_the_scans_split_once_and_for_all(digits: Path) -> None:
    scans = load_digits()
    train, val = TarStore(digits, "train"), TarStore(digits, "val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == val.classes == tuple("0123456789")
    assert len(train.shard_sizes) >= 4
    assert train.shard_sizes.sum() == 1437
    keys = set()
    for store in (train, val):
        for number in range(len(store)):
            sample = store.read(number)
            scan = scans.images[int(sample.key)]
            assert sample.label == scans.target[int(sample.key)] == store.labels[number]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.image))), np.rint(scan * 255 / 16))
            keys.add(sample.key)
    assert len(keys) == 1797
    share = np.bincount(val.labels) / np.bincount(scans.target)
    assert 0.19 < share.min() <= share.max() < 0.21
    assert [val.read(number).key for number in range(4)] == ["1496", "0188", "0705", "0820"]


def test_preparing_again_writes_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    assert prepare_digits(tmp_path / "parent" / "again") is True
    assert contents(tmp_path / "parent" / "again") == contents(digits)


def test_preparing_what_is_complete_leaves_it_alone(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert prepare_digits(copy) is False
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_preparing_finds_damage_in_what_is_complete(copy: Path) -> None:
    flip_byte(copy / "train-000002.tar", 512 + 40)
    assert "train-000002.tar" in input_error(prepare_digits, copy)


def test_preparing_goes_on_after_an_interruption(digits: Path, tmp_path: Path) -> None:
    whole = contents(digits)
    # What a kill leaves behind: an empty folder, a half-written marker, some shards, all but the manifest.
    for number, left in enumerate(
        [
            {},
            {".preparing.0000.tmp": b"di"},
            {"preparing": b"digits", "train-000000.tar": whole["train-000000.tar"], ".train-000001.tar.00.tmp": b"x"},
            {"preparing": b"digits", **{name: file for name, file in whole.items() if name != "manifest.json"}},
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, file in left.items():
            (folder / name).write_bytes(file)
        assert prepare_digits(folder) is True
        assert contents(folder) == whole


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "preparing"])
def test_preparing_never_overwrites_something_else(digits: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    manifest = json.loads((digits / "manifest.json").read_text()) | {"source": "imagenet"}
    file = {"notes.txt": "mine", "manifest.json": json.dumps(manifest), "preparing": "imagenet"}[name]
    (folder / name).write_text(file)
    assert f"{folder} holds something else than a dataset of digits" in input_error(prepare_digits, folder)
    assert contents(folder) == {name: file.encode()}


def test_preparing_refuses_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    input_error(prepare_digits, tmp_path / "file")


def test_webdataset_reads_the_shards(digits: Path) -> None:
    urls = sorted(str(path) for path in digits.glob("train-*.tar"))
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("l8")
    store = TarStore(digits, "train")
    samples = list(pipeline)
    assert len(samples) == len(store)
    for number, sample in enumerate(samples):
        expected = store.read(number)
        assert sample["__key__"] == expected.key
        assert sample["cls"] == expected.label
        assert np.array_equal(sample["png"], np.asarray(Image.open(io.BytesIO(expected.image))))


def test_index_finds_images_in_any_webdataset_tar(tmp_path: Path) -> None:
    """Members in any order, long names, folders, other files beside: what other writers produce."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in [
            ("./", None),
            ("a/one.json", b"{}"),
            ("a/one.cls", b"3"),
            ("a/one.JPEG", b"image one"),
            ("b" * 150 + ".png", b"image two"),
            ("b" * 150 + ".cls", b"0\n"),
        ]:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    split = index_split(tmp_path, "train", [tmp_path / "x.tar"])
    Manifest("somewhere", ("w", "x", "y", "z"), {"train": split}).write(tmp_path)
    store = TarStore(tmp_path, "train")
    assert [store.read(number) for number in range(len(store))] == [
        Sample("a/one", b"image one", 3),
        Sample("b" * 150, b"image two", 0),
    ]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.png": b"i"}, "see a"),
        ({"a.png": b"i", "a.cls": b"0", "b.cls": b"0"}, "see b"),
        ({"a.png": b"i", "a.cls": b"cat"}, "cat"),
        ({"a.txt": b"i"}, "no sample"),
    ],
)
def test_index_refuses_incomplete_samples(tmp_path: Path, members: dict[str, bytes], expected: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    message = input_error(index_split, tmp_path, "train", [tmp_path / "x.tar"])
    assert "x.tar" in message
    assert expected in message
    assert not (tmp_path / "train.index.npy").exists()


def test_index_refuses_a_tar_that_is_cut_off_or_damaged_anywhere(tmp_path: Path) -> None:
    """tarfile itself stops in silence at a damaged header."""
    samples = [Sample(f"{number}", bytes([number]) * 700, 0) for number in range(4)]
    write_split(tmp_path, "train", samples, extension="png", shard_samples=4)
    path = tmp_path / "train-000000.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for cut in (0, 1, 512, 1024, 3000, end, end + 600):
        path.write_bytes(whole[:cut])
        assert "train-000000.tar" in input_error(index_split, tmp_path, "train", [path])
    for header in (0, 1024, 2560, 3584):  # of the first two samples' labels and images
        path.write_bytes(whole)
        flip_byte(path, header + 130)
        assert "train-000000.tar" in input_error(index_split, tmp_path, "train", [path])


def test_index_hash_depends_on_the_samples_and_not_on_the_layout(tmp_path: Path) -> None:
    def index_hash(samples: list[Sample], extension: str = "png", shard_samples: int = 2) -> str:
        return write_split(tmp_path, "x", samples, extension=extension, shard_samples=shard_samples).index_hash

    samples = [Sample(str(number), b"image" * number, number % 2) for number in range(1, 5)]
    first = index_hash(samples)
    assert index_hash(samples, extension="jpeg") == first
    changed = [
        index_hash(samples, shard_samples=3),
        index_hash(samples[::-1]),
        index_hash([samples[0]._replace(image=b"Image"), *samples[1:]]),
        index_hash([samples[0]._replace(label=0), *samples[1:]]),
        index_hash([samples[0]._replace(key="0"), *samples[1:]]),
    ]
    assert len({first, *changed}) == 6


@pytest.mark.parametrize("offset", [0, 100])
def test_a_flipped_byte_in_an_image_is_detected(copy: Path, offset: int) -> None:
    with tarfile.open(copy / "train-000001.tar") as tar:
        image = next(member for member in tar if member.name.endswith(".png"))
    flip_byte(copy / "train-000001.tar", image.offset_data + min(offset, image.size - 1))
    store = TarStore(copy, "train")
    first = int(store.shard_sizes[0])
    message = input_error(store.read, first)
    assert "train-000001.tar" in message
    assert f"key {image.name.removesuffix('.png')}" in message
    assert "checksum" in message
    store.read(first + 1)


def test_a_shard_cut_off_while_it_is_open_is_detected(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convneur.data.stores.retry.DELAYS", (0.0, 0.0))
    store = TarStore(copy, "val")
    last = int(store.shard_sizes[0]) - 1
    store.read(0)
    os.truncate(copy / "val-000000.tar", 5000)
    message = input_error(store.read, last)
    assert "val-000000.tar can't be read (it ends within the sample at byte" in message
    assert "3 attempts" in message


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no complete dataset"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no complete dataset"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1}'), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 99}'), "format 99"),
        (lambda folder: (folder / "train.index.npy").unlink(), "train.index.npy is missing"),
        (lambda folder: flip_byte(folder / "train.index.npy", 5000), "train.index.npy does not match"),
        (lambda folder: (folder / "train-000003.tar").unlink(), "train-000003.tar is missing"),
        (lambda folder: (folder / "train-000003.tar").write_bytes(b""), "train-000003.tar has 0 bytes"),
        (lambda folder: os.truncate(folder / "train-000005.tar", 1000), "train-000005.tar has 1000 bytes"),
    ],
)
def test_an_incomplete_dataset_is_refused_in_one_line(copy: Path, damage: object, expected: str) -> None:
    damage(copy)
    message = input_error(TarStore, copy, "train")
    assert expected in message
    assert str(copy) in message
    assert "prepare" in message


def test_a_missing_split_is_refused_with_those_there_are(digits: Path) -> None:
    assert "no split 'test'; it has train, val" in input_error(TarStore, digits, "test")


def test_a_file_is_no_dataset(digits: Path) -> None:
    assert "holds no complete dataset" in input_error(TarStore, digits / "manifest.json", "train")


def _read_all(store: TarStore) -> list[Sample]:
    return [store.read(number) for number in range(len(store))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_to_other_processes(digits: Path, method: str) -> None:
    store = TarStore(digits, "val")
    expected = _read_all(store)
    with get_context(method).Pool(1) as pool:
        assert pool.map(_read_all, [store, store]) == [expected, expected]
    assert _read_all(store) == expected


def test_pickled_stores_carry_no_index(digits: Path) -> None:
    assert len(pickle.dumps(TarStore(digits, "train"))) < 300


def test_few_shards_are_open_at_a_time(tmp_path: Path) -> None:
    shards = 2 * OPEN_SHARDS
    samples = [Sample(str(number), bytes([number]), 0) for number in range(shards)]
    split = write_split(tmp_path, "train", samples, extension="png", shard_samples=1)
    Manifest("test", ("a",), {"train": split}).write(tmp_path)

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    store = TarStore(tmp_path, "train")
    index = open_files()
    assert [store.read(number % shards) for number in range(3 * shards)] == samples * 3
    assert open_files() == index + OPEN_SHARDS
    del store
    assert open_files() == before
