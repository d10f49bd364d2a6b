"""Damage of every kind to prepared datasets: what verify finds, what it denies, what training makes of it; and size."""

import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError
from convneur.data.format.index import INDEX_FIELDS, Scan, write_index
from convneur.data.format.manifest import Manifest, Shard
from convneur.data.format.selection import Tally
from convneur.data.format.shards import write_shard
from convneur.data.inspect.show import summarize
from convneur.data.inspect.verify import verify_dataset
from convneur.data.prepare.foreign import prepare_index
from convneur.data.prepare.synthetic import SyntheticImages, prepare_synthetic
from convneur.data.stores.tar import TarStore
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.train import TrainLoader
from convneur.data.views.decode import decode
from convneur.launch.cli import main
from convneur.tools.contact_sheet import contact_sheet


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training images in five shards, four to evaluate on."""
    folder = tmp_path_factory.mktemp("original") / "data"
    prepare_synthetic(folder, classes=4, images=40, height=30, width=40, processes=1, shard_samples=8)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def member(path: Path, key: str, extension: str = "jpg") -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(f"{key}.{extension}")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def stream(folder: Path, world_size: int = 1) -> tuple[list[str], TrainLoader]:
    """Keys of two epochs."""
    config = DataConfig(
        root=str(folder),
        image_size=8,
        global_batch_size=4,
        lanes=2,
        window=2,
        workers=0,
        augment=AugmentConfig(randaugment="", mixup=0, cutmix=0),
    )
    store = TarStore(folder, "train")
    ranks = [
        TrainLoader(config, store, seed=0, rank=rank, world_size=world_size, accumulation=1)
        for rank in range(world_size)
    ]
    steps = zip(*(rank.iterate(0, 2 * rank.steps_per_epoch) for rank in ranks), strict=True)
    indices = [index for step in steps for (batch,) in step for index in batch.indices.tolist()]
    return [store.read(index).key for index in indices], ranks[0]


def test_an_intact_dataset_stays_as_it_is(copy: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in copy.iterdir()}
    assert [(found.samples, found.denied, found.shards) for found in verify_dataset(copy, 2)] == [
        (40, (), ()),
        (4, (), ()),
    ]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in copy.iterdir()} == before


def test_denied_samples_are_gone_from_order_evaluation_and_hash(copy: Path) -> None:
    whole, before = stream(copy)
    for split, shard, key in (("train", 1, 9), ("train", 1, 15), ("train", 4, 39), ("val", 0, 2)):
        path = copy / f"{split}-{shard:06d}.tar"
        flip(path, member(path, f"{split}{key:08d}").offset_data + 200)
    findings = {found.split: found for found in verify_dataset(copy, 2)}
    assert [(denied.row, denied.key, denied.reason) for denied in findings["train"].denied] == [
        (row, f"train{row:08d}", "checksum mismatch") for row in (9, 15, 39)
    ]
    assert [line.split(":")[0] for line in findings["train"].shards] == ["train-000001.tar", "train-000004.tar"]
    assert [denied.key for denied in findings["val"].denied] == ["val00000002"]

    store = TarStore(copy, "train")
    assert (len(store), store.shard_sizes.tolist()) == (37, [8, 6, 8, 8, 7])
    gone = {"train00000009", "train00000015", "train00000039"}
    assert {store.read(number).key for number in range(37)} == {f"train{n:08d}" for n in range(40)} - gone
    assert [store.read(number).label for number in range(37)] == store.labels.tolist()
    assert store.index_hash != TarStore(copy, "val").index_hash != before.index_hash
    keys, loader = stream(copy)
    assert not set(keys) & gone
    assert not loader.bad_samples
    assert sorted(keys) == sorted(stream(copy, world_size=2)[0])
    with pytest.raises(InputError, match="index_hash"):
        loader.check_state(before.state(3))

    val = TarStore(copy, "val")
    for world_size in (1, 2, 5):
        loaders = [
            EvalLoader(DataConfig(image_size=8, workers=0), val, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert sum(int(batch.mask.sum()) for loader in loaders for batch in loader) == len(val) == 3
    assert [(split.samples, split.denied) for split in summarize(copy)[1]] == [(37, 3), (3, 1)]

    again = verify_dataset(copy, 1)
    assert again[0] == findings["train"]
    assert len(whole) == 80


def test_what_was_restored_is_allowed_again(original: Path, copy: Path) -> None:
    path = copy / "train-000002.tar"
    flip(path, member(path, "train00000020").offset_data)
    manifest = (copy / "manifest.json").read_bytes()
    assert len(verify_dataset(copy, 1)[0].denied) == 1
    assert (copy / "manifest.json").read_bytes() != manifest
    shutil.copy(original / "train-000002.tar", path)
    assert not verify_dataset(copy, 1)[0].denied
    assert (copy / "manifest.json").read_bytes() == manifest


def test_images_that_were_never_readable_are_denied(tmp_path: Path) -> None:
    images = SyntheticImages("train", 6, 2, 20, 20)
    bad = {1: b"", 2: b"no image", 4: images[4].image[:300]}
    samples = [images[number]._replace(image=bad.get(number, images[number].image)) for number in range(6)]
    write_shard(tmp_path / "x.tar", samples, "jpg")
    prepare_index(str(tmp_path / "*.tar"), tmp_path / "index", split="train", processes=1)
    (found,) = verify_dataset(tmp_path / "index", 1)
    assert [denied.row for denied in found.denied] == [1, 2, 4]
    assert "truncated" in found.denied[2].reason.lower()
    assert found.shards == ()
    store = TarStore(tmp_path / "index", "train")
    assert [store.read(number).key for number in range(3)] == [f"train{number:08d}" for number in (0, 3, 5)]


def test_a_flipped_header_hurts_no_image_and_is_reported(copy: Path) -> None:
    """Images are read at their offsets; a reader that walks the headers would lose the rest of the shard."""
    path = copy / "train-000000.tar"
    keys, _ = stream(copy)
    flip(path, member(path, "train00000003").offset + 130)
    assert stream(copy)[0] == keys
    found = verify_dataset(copy, 1)[0]
    assert found.denied == ()
    assert found.shards == ("train-000000.tar: not the bytes that were indexed",)


def test_the_command_line_says_it(copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "verify", str(copy)]) == 0
    path = copy / "train-000001.tar"
    flip(path, member(path, "train00000011").offset_data + 99)
    assert main(["data", "verify", str(copy), "--processes", "1"]) == 1
    output = capsys.readouterr().out
    assert "train: train00000011: checksum mismatch: denied\n" in output
    assert "train: 39 of 40 images intact\n" in output
    sheet = tmp_path / "sheet.png"
    assert main(["data", "show", str(copy), "--sheet", str(sheet), "--data.image_size", "32"]) == 0
    output = capsys.readouterr().out
    assert "synthetic, 4 classes" in output
    assert "9/10/10" in output
    picture = Image.open(sheet)
    assert picture.size == (8 * 32, 5 * 44)  # 39 images leave room for 38
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 1000
    for words, expected in (
        (["data", "show", str(copy), "--sheet", str(tmp_path / "no" / "x.png")], "--sheet"),
        (["data", "verify", str(tmp_path)], "holds no complete dataset"),
        (["data", "verify", str(copy), "--processes", "0"], "--processes is 0"),
        (["prepare", "synthetic", "--out", "x", "--size", "3"], "--size is 3"),
        (["prepare", "synthetic", "--out", "x", "--classes", "0"], "--classes is 0"),
        (["prepare", "imagenet", "--source", "x", "--out", "y", "--part", "0/3"], "--part is 0/3"),
        (["prepare", "imagenet", "--source", "x", "--out", "y", "--part", "4/3"], "--part is 4/3"),
        (["prepare", "imagenet", "--source", str(tmp_path), "--out", "y"], "holds neither"),
        (["prepare", "index", str(tmp_path / "*.zip"), "--out", "y"], "no such shard"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert expected in error


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


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def read_all(folder: Path) -> list[Callable[[], object]]:
    return [lambda: verify_dataset(folder, 1), lambda: TarStore(folder, "train"), lambda: summarize(folder)]


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
            assert f"{folder}/manifest.json" in refused(lambda: Manifest.read(Path(folder)))
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
    message = refused(lambda: TarStore(copy, "train"))
    assert expected in message
    assert str(copy) in message


def test_what_is_no_file_is_no_manifest(copy: Path) -> None:
    manifest = copy / "manifest.json"
    for spoil in (lambda: manifest.mkdir(), lambda: os.mkfifo(manifest), lambda: manifest.write_text("[" * 100_000)):
        manifest.unlink()
        spoil()
        for read in read_all(copy):
            assert f"{manifest} is damaged" in refused(read)
        if manifest.is_dir():
            manifest.rmdir()
            manifest.touch()


def test_showing_names_the_images_that_others_stand_in_for(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "train-000001.tar"
    flip(path, member(path, "train00000009").offset_data + 200)
    words = ["data", "show", str(copy), "--sheet", str(copy / "sheet.png"), "--data.image_size", "32"]
    assert main(words) == 0
    assert "train-000001.tar, split train, key train00000009: checksum mismatch" in capsys.readouterr().out


def test_a_dataset_without_a_readable_image_is_refused_in_one_line(copy: Path) -> None:
    for path in copy.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            places = [info.offset_data for info in tar if info.name.endswith("jpg")]
        for place in places:
            flip(path, place)
    assert len(verify_dataset(copy, 1)[0].denied) == 40
    config = DataConfig(root=str(copy), image_size=16)
    assert "0 samples in split 'train': too few to show" in refused(lambda: contact_sheet(config, copy / "sheet.png"))


def test_preparing_again_notices_files_that_are_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"classes": 4, "images": 40, "height": 30, "width": 40, "processes": 1, "shard_samples": 8}
    assert not prepare_synthetic(copy, **words)
    os.truncate(copy / "train-000002.tar", 100)
    assert "train-000002.tar has 100 bytes" in refused(lambda: prepare_synthetic(copy, **words))
    (copy / "train-000002.tar").unlink()
    assert "train-000002.tar is missing" in refused(lambda: prepare_synthetic(copy, **words))


def test_the_mark_of_another_dataset_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "preparing").write_bytes(b"\xff\xfe")
    message = refused(lambda: prepare_synthetic(tmp_path, classes=1, images=1, height=8, width=8, processes=1))
    assert "holds something else" in message


@pytest.mark.parametrize("command", ["digits", "synthetic --classes 1 --images 1 --size 8x8", "index {}/train-*.tar"])
def test_a_folder_that_cannot_be_made_is_one_line(copy: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = copy / "manifest.json" / "data"
    assert main(["prepare", *command.format(copy).split(), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"convneur: error: [Errno 20] Not a directory: '{out}': "
        "see to it and run the command again, it goes on where it stopped\n"
    )


def test_a_pipe_is_no_shard(copy: Path, tmp_path: Path) -> None:
    (copy / "train-000002.tar").unlink()
    os.mkfifo(copy / "train-000002.tar")
    pattern, out = str(copy / "train-*.tar"), tmp_path / "index"
    assert "train-000002.tar is no file" in refused(lambda: prepare_index(pattern, out, split="train", processes=1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bytes_are_replaced_or_denied_and_never_shown(
    original: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("any") / "data"))
    path = folder / "train-000002.tar"
    size = path.stat().st_size
    offsets = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=4))
    for offset in offsets:
        flip(path, offset)
    infos = {f"train{number:08d}": member(original / path.name, f"train{number:08d}") for number in range(16, 24)}
    hit = {
        key
        for key, info in infos.items()
        if any(info.offset_data <= offset < info.offset_data + info.size for offset in offsets)
    }
    keys, loader = stream(folder)
    assert not set(keys) & hit
    assert len(keys) == 80
    assert {reason.split("key ")[1].split(":")[0] for reason in loader.bad_samples.values()} <= hit
    found = verify_dataset(folder, 1)[0]
    assert {denied.key for denied in found.denied} == hit
    assert found.shards
    assert not set(stream(folder)[0]) & hit
    assert len(TarStore(folder, "train")) == 40 - len(hit)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["jpeg", "png", "webp", "gif"]))
def test_damaged_images_decode_as_pillow_does_or_raise_one_line(data: st.DataObject, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(decode(SyntheticImages("x", 1, 1, 24, 33)[0].image)).save(buffer, kind)
    content = bytearray(buffer.getvalue()[: data.draw(st.integers(0, 2000))])
    for offset, value in data.draw(st.dictionaries(st.integers(0, 1500), st.integers(0, 255), max_size=3)).items():
        if offset < len(content):
            content[offset] = value
    try:
        expected = Image.open(io.BytesIO(bytes(content))).convert("RGB")
    except Exception:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            decode(bytes(content))
    else:
        assert np.array_equal(decode(bytes(content)), np.asarray(expected))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of 1,282 shards with 1.28 million samples. The shards are sparse, all but the sizes."""
    folder = tmp_path_factory.mktemp("large")
    shards, per_shard = 1282, 1000
    scans = []
    for number in range(shards):
        rows = np.zeros(per_shard, dtype=[*INDEX_FIELDS, ("key", "S24")])
        rows["offset"], rows["size"] = np.arange(per_shard) * 110_000, 100_000
        rows["label"] = (np.arange(per_shard) + number) % 1000
        rows["key"] = [b"n%08d_%d" % (number, sample) for sample in range(per_shard)]
        path = folder / f"train-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(per_shard * 110_000)
        scans.append(Scan(Shard(path.name, per_shard * 110_000, 0, per_shard), rows, Tally()))
    split = write_index(folder, "train", scans)
    Manifest("test", tuple(map(str, range(1000))), {"train": split}).write(folder)
    return folder


def test_an_index_of_imagenets_size_opens_within_two_seconds(large: Path) -> None:
    taken = []
    for _ in range(3):
        start = time.process_time()
        store = TarStore(large, "train")
        assert (len(store), len(store.shard_sizes)) == (1_282_000, 1282)
        taken.append(time.process_time() - start)
    assert min(taken) < 2


def test_the_first_batch_at_step_300000_comes_as_soon_as_at_step_0(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TarStore(large, "train")
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    monkeypatch.setattr("convneur.data.stream.train.read_pixels", lambda *_: (pixels, 0))  # the shards hold no images
    config = replace(DataConfig(), workers=0, image_size=8, global_batch_size=1024)
    taken: dict[int, list[float]] = {0: [], 300_000: []}
    for _ in range(3):
        for step, seconds in taken.items():
            start = time.process_time()
            loader = TrainLoader(config, store, seed=0, rank=0, world_size=8, accumulation=1)
            (batch,) = next(loader.iterate(step, step + 1))
            seconds.append(time.process_time() - start)
            assert batch.epoch == step // 1251
            assert batch.indices.shape == (128,)
    assert min(taken[300_000]) < 1.5 * min(taken[0]) + 0.05
