"""Damage of every kind to prepared datasets: what verify finds, what it denies, what training makes of it."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import input_error

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError
from convneur.data.format.shards import write_shard
from convneur.data.inspect.show import summarize
from convneur.data.inspect.verify import verify_dataset
from convneur.data.prepare.foreign import prepare_index
from convneur.data.prepare.synthetic import SyntheticImages, prepare_synthetic
from convneur.data.stores.tar import TarStore
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.train import TrainLoader
from convneur.launch.cli import main
from convneur.tools.contact_sheet import contact_sheet


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
    assert "0 samples in split 'train': too few to show" in input_error(
        lambda: contact_sheet(config, copy / "sheet.png")
    )


def test_preparing_again_notices_files_that_are_gone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"classes": 4, "images": 40, "height": 30, "width": 40, "processes": 1, "shard_samples": 8}
    assert not prepare_synthetic(copy, **words)
    os.truncate(copy / "train-000002.tar", 100)
    assert "train-000002.tar has 100 bytes" in input_error(lambda: prepare_synthetic(copy, **words))
    (copy / "train-000002.tar").unlink()
    assert "train-000002.tar is missing" in input_error(lambda: prepare_synthetic(copy, **words))


def test_the_mark_of_another_dataset_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "preparing").write_bytes(b"\xff\xfe")
    message = input_error(lambda: prepare_synthetic(tmp_path, classes=1, images=1, height=8, width=8, processes=1))
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
    assert "train-000002.tar is no file" in input_error(lambda: prepare_index(pattern, out, split="train", processes=1))


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
