"""What of a source is taken and what is left out: it adds up, is said, and is never a silent loss."""

import io
import multiprocessing
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import input_error
from torchvision.datasets import ImageFolder

from convneur.data.format.manifest import Manifest
from convneur.data.format.selection import Tally
from convneur.data.inspect.verify import verify_dataset
from convneur.data.prepare.foreign import prepare_index
from convneur.data.prepare.imagenet import prepare_imagenet
from convneur.data.stores.tar import TarStore

Members = list[tuple[str, bytes]]


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "png")
    return buffer.getvalue()


def pairs(*keys: str) -> Members:
    """An image and a label 0, 1, ... for each key."""
    return [part for i, key in enumerate(keys) for part in ((f"{key}.png", png(i)), (f"{key}.cls", b"%d" % i))]


def write(path: Path, members: Members, links: dict[str, tuple[bytes, str]] | None = None) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, (kind, target) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


def index(shard: Path, out: Path, split: str = "train") -> tuple[dict[str, tuple[bytes, int]], list[str]]:
    """Key to image and label, and the lines said."""
    lines: list[str] = []
    count = prepare_index(str(shard), out, split=split, processes=1, say=lines.append)
    store = TarStore(out, split)
    found = {sample.key: (sample.image, sample.label) for sample in map(store.read, range(len(store)))}
    assert len(found) == len(store) == count
    return found, lines


def test_an_index_takes_or_names_every_file_of_a_shard(tmp_path: Path) -> None:
    litter = ["._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "d/.DS_Store", "Thumbs.db"]
    others = ["a.json", "notes", "a.gif"]
    members = [
        *pairs("a", "b.resized", "d.e/c", "caf\udce9", "c.1.2"),
        ("a.seg.png", png(9)),
        ("f.BMP", b""),
        ("f.CLS", b" +4\n"),
        *((name, b"x") for name in litter + others),
    ]
    links = {
        "hard.png": (tarfile.LNKTYPE, "a.png"),
        "hard.cls": (tarfile.LNKTYPE, "d.e/c.cls"),
        "g/soft.png": (tarfile.SYMTYPE, "../a.png"),
        "g/soft.cls": (tarfile.SYMTYPE, "more.cls"),
        "g/more.cls": (tarfile.SYMTYPE, "../hard.cls"),
        "g/more.png": (tarfile.SYMTYPE, "../a.json"),
    }
    found, lines = index(write(tmp_path / "x.tar", members, links), tmp_path / "out")
    expected = {"a": (png(0), 0), "b.resized": (png(1), 1), "d.e/c": (png(2), 2), "caf\\xe9": (png(3), 3)}
    expected |= {"c.1.2": (png(4), 4), "f": (b"", 4), "hard": (png(0), 2), "g/soft": (png(0), 2), "g/more": (b"x", 2)}
    assert found == expected
    assert lines == [
        "train: 9 images taken, 9 files left out: 5 hidden or of the system (._a.png, .ipynb_checkpoints/a.png, "
        "__MACOSX/a.png, ...); 3 that are no images (a.json, notes, a.gif); 1 more of a sample that has its own "
        "(a.seg.png)",
        "train: of the images taken, 1 empty, which nothing can show (f.BMP)",
    ]


@pytest.mark.parametrize(
    ("members", "links", "expected"),
    [
        ([*pairs("a"), ("a.cls", b"3")], {}, "a has several labels: a.cls, a.cls"),
        ([*pairs("a"), ("a.jpg", b"3")], {}, "a has several images: a.png, a.jpg"),
        ([("a.left.png", b"x"), ("a.right.png", b"x"), ("a.cls", b"0")], {}, "see a.cls"),
        ([("a.png", b"x"), ("a.cls", b"3.0")], {}, "a.cls holds '3.0', expected a class's number"),
        ([("a.png", b"x"), ("a.cls", b"1_0")], {}, "a.cls holds '1_0'"),
        ([("a.png", b"x"), ("a.cls", b"-1")], {}, "a.cls holds '-1'"),
        ([("a.png", b"x"), ("a.cls", b"")], {}, "a.cls holds ''"),
        ([("a.png", b"x"), ("a.cls", b"9" * 5000)], {}, "a.cls holds '99"),
        ([("a.png", b"x"), ("a.cls", b"\xff")], {}, r"a.cls holds '\\xff'"),
        (pairs("a"), {"b.png": (tarfile.SYMTYPE, "/etc/x"), "b.cls": (tarfile.LNKTYPE, "a.cls")}, "b.png is a link to"),
        (pairs("a"), {"b.png": (tarfile.SYMTYPE, "b.png"), "b.cls": (tarfile.LNKTYPE, "a.cls")}, "b.png is a link to"),
        ([("._a.png", b"x")], {}, "there is no sample at all"),
    ],
)
def test_an_index_refuses_in_one_line_and_leaves_nothing(
    tmp_path: Path, members: Members, links: dict[str, tuple[bytes, str]], expected: str
) -> None:
    shard = write(tmp_path / "x.tar", members, links)
    message = input_error(lambda: prepare_index(str(shard), tmp_path / "new" / "out", split="train", processes=1))
    assert expected in message
    assert "x.tar" in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_shard_is_refused(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "x.tar", mode) as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    assert "is compressed with" in input_error(lambda: index(tmp_path / "x.tar", tmp_path / "out"))
    index(write(tmp_path / "x.tar", pairs("BZh")), tmp_path / "out")


def test_a_member_that_does_not_lie_in_the_file_as_it_is_is_refused(tmp_path: Path) -> None:
    shard = write(tmp_path / "x.tar", pairs("a"))
    whole = shard.read_bytes()
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 40
    shard.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + whole[512:])
    assert "cut off within a.png" in input_error(lambda: index(shard, tmp_path / "out"))
    sparse = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    sparse = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    sparse[386:410] = b"%011o\0%011o\0" % (0, 512)  # a piece: where it belongs, and its length
    sparse[483:495] = b"%011o\0" % (1 << 20)
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148]) + 8 * 32 + sum(sparse[156:]))
    shard.write_bytes(bytes(sparse) + whole[512:])
    assert "a.png is stored with holes" in input_error(lambda: index(shard, tmp_path / "out"))


def test_what_occurs_twice_is_refused_or_said(tmp_path: Path) -> None:
    first, second = write(tmp_path / "0.tar", pairs("a", "b")), write(tmp_path / "1.tar", pairs("a", "c", "d"))
    out = tmp_path / "out"
    for pattern in (f"{tmp_path}/{{0,1,0}}.tar", f"{tmp_path}/{{*,0}}.tar"):
        assert f"names {first} twice" in input_error(lambda pattern=pattern: index(Path(pattern), out))
    (tmp_path / "2.tar").write_bytes(first.read_bytes())
    assert "is the same as" in input_error(lambda: index(tmp_path / "*.tar", out))
    (tmp_path / "2.tar").unlink()
    lines: list[str] = []
    assert prepare_index(f"{tmp_path}/*.tar", out, split="train", processes=1, say=lines.append) == 5
    assert lines == ["warning: train: 1 images occur more than once, key and bytes, such as a"]
    _, lines = index(second, out, "val")
    assert lines == [f"warning: val: 1 shards are in split train, too, such as {second}"]
    assert "a brace that isn't closed" in input_error(lambda: index(tmp_path / "{0,1.tar", out))
    assert "--split is '../x'" in input_error(lambda: index(first, out, "../x"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Folders 0, 1, 2 and 10 of training images that ImageFolder takes, and what systems and people leave there."""
    root = tmp_path / "source"
    for number, name in enumerate(("0", "1", "2", "10")):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "same.PNG").write_bytes(png(10 * number))
    (root / "train" / "2" / "more" / "deep").mkdir(parents=True)
    (root / "train" / "2" / "more" / "deep" / "same.png").write_bytes(png(21))
    for kind in ("webp", "bmp", "tiff", "ppm"):
        Image.new("RGB", (8, 8)).save(root / "train" / "1" / f"same.{kind}")
    with open(os.fsencode(root / "train" / "1") + b"/caf\xe9.v1.jpg", "wb") as file:  # noqa: PTH123
        file.write(png(19))
    return root


def prepared(source: Path, out: Path) -> tuple[list[str], dict[str, int], list[str]]:
    """Classes, key to label of the training images, and the lines said."""
    lines: list[str] = []
    prepare_imagenet(source, out, processes=1, say=lines.append)
    store = TarStore(out, "train")
    keys = {sample.key: sample.label for sample in map(store.read, range(len(store)))}
    assert len(keys) == len(store)
    return list(store.classes), keys, lines


def test_folders_are_taken_as_torchvision_takes_them(source: Path, tmp_path: Path) -> None:
    classes, keys, lines = prepared(source, tmp_path / "out")
    assert classes == ["0", "1", "2", "10"]
    expected = ImageFolder(str(source / "train"))
    by_name = np.bincount([classes.index(expected.classes[label]) for _, label in expected.samples])
    assert np.array_equal(np.bincount(list(keys.values())), by_name)
    assert keys["2/more/deep/same_png"] == 2
    assert keys["1/caf\\xe9_v1_jpg"] == 1
    assert lines == []


def test_what_is_left_out_of_folders_adds_up_and_is_said(source: Path, tmp_path: Path) -> None:
    _, before, _ = prepared(source, tmp_path / "before")
    train = source / "train"
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (train / name).mkdir()
        (train / name / "x.png").write_bytes(png(1))
    for name in ("0/._same.PNG", "0/Thumbs.db", "flat.png", "labels.csv", "1/x.gif", "1/notes"):
        (train / name).write_bytes(b"x")
    (train / "0" / "empty.png").write_bytes(b"")
    classes, keys, lines = prepared(source, tmp_path / "out")
    assert classes == ["0", "1", "2", "10"]
    assert keys == before | {"0/empty_png": 0}
    assert lines == [
        "train: 11 images taken, 8 files left out: 4 hidden or of the system (train/.ipynb_checkpoints, "
        "train/__MACOSX, 0/._same.PNG, ...); 2 in no class's folder (train/flat.png, train/labels.csv); "
        "2 that are no images (1/notes, 1/x.gif)",
        "train: of the images taken, 1 empty, which nothing can show (0/empty.png)",
    ]


def test_a_class_without_images_and_links_that_lead_nowhere_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "train" / "3").mkdir()
    (source / "train" / "3" / "._x.png").write_bytes(b"x")
    assert "class 3 of" in input_error(lambda: prepared(source, tmp_path / "out"))
    (source / "train" / "3" / "loop").symlink_to(source / "train" / "3")
    assert "loop is a link to a folder above it" in input_error(lambda: prepared(source, tmp_path / "out"))
    (source / "train" / "3" / "loop").unlink()
    (source / "train" / "3" / "gone.png").symlink_to(tmp_path / "gone")
    assert "gone.png is a link to nothing" in input_error(lambda: prepared(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_validation_images_alone_are_a_dataset(source: Path, tmp_path: Path) -> None:
    train = (source / "train").rename(tmp_path / "train")
    lines: list[str] = []
    assert prepare_imagenet(source, tmp_path / "out", processes=1, say=lines.append)
    assert "no training images" in lines[0]
    store = TarStore(tmp_path / "out", "val")
    assert {store.read(i).key: store.read(i).label for i in range(4)} == {
        "0/same": 0,
        "1/same": 1,
        "2/same": 2,
        "10/same": 3,
    }
    train.rename(source / "train")
    assert "holds split val, not train and val" in input_error(lambda: prepared(source, tmp_path / "out"))
    flat = tmp_path / "flat"
    (flat / "val").mkdir(parents=True)
    (flat / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(png(1))
    message = input_error(lambda: prepare_imagenet(flat, tmp_path / "other", processes=1))
    assert "but no folders of classes" in message
    assert "LOC_val_solution.csv" in message


def test_two_indices_at_once_add_both_splits(tmp_path: Path) -> None:
    """Each begins before the other has ended; a third split is added while the dataset is being verified."""
    shards = {split: write(tmp_path / f"{split}.tar", pairs("a", split)) for split in ("train", "val", "test")}
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    stopped = [context.Process(target=index, args=(shards[split], out, split)) for split in ("train", "val")]
    for process in stopped:
        process.start()
    for process in stopped:
        process.join()
        assert process.exitcode == 0
    assert Manifest.read(out).splits.keys() == {"train", "val"}
    assert {path.name for path in out.iterdir()} == {"manifest.json", "train.index.npy", "val.index.npy"}
    content = shards["val"].read_bytes()
    shards["val"].write_bytes(content.replace(b"IHDR", b"IHDr", 1))
    verify_dataset(out, processes=1)
    assert len(Manifest.read(out).splits["val"].denied) == 1
    index(shards["test"], out, "test")
    assert len(Manifest.read(out).splits["val"].denied) == 1
    assert len(Manifest.read(out).splits) == 3


def test_tallies_add_up() -> None:
    one, other = Tally(), Tally()
    for number in range(5):
        (one if number % 2 else other).leave_out("odd" if number % 3 else "even", f"f{number}")
    total = Tally().add([one, other])
    assert total.left_out == {"odd": 3, "even": 2}
    assert total.lines("x") == ["x: 0 images taken, 5 files left out: 3 odd (f1, f2, f4); 2 even (f3, f0)"]
    assert Tally().lines("x") == []
