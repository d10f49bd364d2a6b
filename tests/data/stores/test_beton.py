"""Datasets in FFCV's format: written whole or not at all, the samples of the shards to the bit, damage found."""

import hashlib
import io
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import input_error

from convneur.data.check import check_data
from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import SampleError
from convneur.data.files import TEMPORARY
from convneur.data.format.beton import JPG, RAW
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.inspect.verify import verify_dataset
from convneur.data.native import library
from convneur.data.prepare.betons import Pixels, add_betons
from convneur.data.prepare.digits import prepare_digits
from convneur.data.prepare.synthetic import SyntheticImages
from convneur.data.prepare.tile import prepare_tile
from convneur.data.stores.beton import BetonStore
from convneur.data.stores.choose import open_store
from convneur.data.stores.store import Store
from convneur.data.stores.tar import TarStore
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.train import TrainLoader
from convneur.data.views.decode import decode
from convneur.launch.cli import main
from convneur.tasks.mixing import DeviceTransform

pytestmark = pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV, WHICH IS OPTIONAL, IS NOT INSTALLED HERE")

PLAIN, LABELS = 40, 3
STEPS, STOP = 5, 8  # 46 samples in batches of 8: 5 steps an epoch, of which 8 are more than one and a half


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> list[bytes]:
    """Photographs, and what ImageNet has besides."""
    plain = SyntheticImages("odd", PLAIN, LABELS, 40, 56)
    picture = Image.open(io.BytesIO(plain[0].image))
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees, which nobody does
    return [
        *(plain[number].image for number in range(PLAIN)),
        encoded(picture.convert("L"), "jpeg"),
        encoded(picture.convert("CMYK"), "jpeg"),
        encoded(picture, "png"),
        encoded(picture.convert("RGBA"), "png"),
        encoded(picture, "jpeg", exif=exif, progressive=True),
        encoded(picture, "webp", lossless=True),
    ]


def write_dataset(folder: Path, pixels: Pixels | None, images: list[bytes]) -> Path:
    """Both splits with these images, 9 in a shard, as shards and, if `pixels` says how, betons."""
    samples = [Sample(f"s{number}", image, number % LABELS) for number, image in enumerate(images)]
    folder.mkdir()
    splits = {name: write_split(folder, name, samples, extension="jpg", shard_samples=9) for name in ("train", "val")}
    Manifest("test", tuple("abc"), splits).write(folder)
    if pixels:
        assert add_betons(folder, "both", pixels, processes=2)
    return folder


@pytest.fixture(scope="module", params=["jpg", "raw"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("both") / request.param, request.param, images())


@pytest.fixture(scope="module")
def jpg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("jpg") / "jpg", "jpg", images())


@pytest.fixture
def copy(jpg: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(jpg, tmp_path / "copy"))


def config(root: Path, **settings: object) -> DataConfig:
    small = DataConfig(
        root=str(root), image_size=16, global_batch_size=8, lanes=4, window=2, workers=0, eval_batch_size=7
    )
    return replace(small, **settings)


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_beton_holds_the_samples_of_the_shards(both: Path) -> None:
    tar, beton = TarStore(both, "train"), BetonStore(both, "train")
    assert len(beton) == len(tar) == PLAIN + 6
    assert (beton.index_hash, beton.classes, beton.is_remote) == (tar.index_hash, tar.classes, False)
    assert np.array_equal(beton.shard_sizes, tar.shard_sizes)
    assert np.array_equal(beton.labels, tar.labels)
    for number in range(len(tar)):
        ours, theirs = beton.read(number), tar.read(number)
        assert (ours.key, ours.label) == (theirs.key, theirs.label)
        assert np.array_equal(decode(ours.image), decode(theirs.image))


def test_jpegs_are_kept_and_what_ffcv_cannot_decode_is_pixels(jpg: Path) -> None:
    beton = BetonStore(jpg, "train")
    kept = [*range(PLAIN + 1), PLAIN + 4]
    assert np.flatnonzero(beton.images["mode"] == JPG).tolist() == kept
    assert all(beton.read(number).image == image for number, image in enumerate(images()) if number in kept)
    assert set(zip(beton.images["width"].tolist(), beton.images["height"].tolist(), strict=True)) == {(56, 40)}


def test_raw_betons_hold_pixels_alone(both: Path) -> None:
    if both.name == "raw":
        assert (BetonStore(both, "train").images["mode"] == RAW).all()


def test_ffcv_reads_it(jpg: Path) -> None:
    """FFCV's own loader, with a stock decoder, and its other way of reading, which depends on the pages."""
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader

    pipelines = {"image": [CenterCropRGBImageDecoder((40, 40), 1.0)]}
    threads = torch.get_num_threads()
    batches = list(
        Loader(str(jpg / "train.beton"), 46, num_workers=1, os_cache=False, drop_last=False, pipelines=pipelines)
    )
    torch.set_num_threads(threads)
    ((pixels, labels),) = batches
    store = TarStore(jpg, "train")
    assert labels.flatten().tolist() == store.labels.tolist()
    for number, theirs in enumerate(pixels):
        ours = decode(store.read(number).image)[:, 8:48]
        assert np.abs(theirs.astype(int) - ours).mean() < 2, number


@pytest.mark.skipif(library() is None, reason="THERE IS NO C++ COMPILER HERE")
def test_it_holds_tiled_jpegs_and_ffcv_decodes_them(jpg: Path, tmp_path: Path) -> None:
    from ffcv.libffcv import imdecode

    prepare_tile(jpg, tmp_path / "out", tiles=2, processes=1, format="ffcv", say=len)
    tiled, original = BetonStore(tmp_path / "out", "train"), BetonStore(jpg, "train")
    for number in range(len(tiled)):
        ours, theirs = tiled.read(number), original.read(number)
        is_jpeg = tiled.images["mode"][number] == JPG == original.images["mode"][number]
        changed = number <= PLAIN  # the rest is progressive, or no JPEG
        assert (ours.image != theirs.image, ours.proven, theirs.proven) == (changed, is_jpeg, False)
        made = np.zeros((2 * is_jpeg, 40, 56, 3), np.uint8)
        for sample, pixels in zip((ours, theirs), made, strict=False):
            assert imdecode(np.frombuffer(sample.image, np.uint8), pixels, 40, 56, 40, 56) == 0
        assert not is_jpeg or np.array_equal(*made)


def stream(config: DataConfig, store: Store, world_size: int = 1) -> Iterator[list[tuple[object, ...]]]:
    """For each step, each sample's key, targets (which hold lambda), and hashes of its pixels before and after mixing.

    Crops show in the pixels.
    """
    transform = DeviceTransform(config, LABELS, label_smoothing=0.1, seed=3, device=torch.device("cpu"))
    ranks = [
        TrainLoader(config, store, seed=3, rank=rank, world_size=world_size, accumulation=1).iterate(0, STOP)
        for rank in range(world_size)
    ]
    for step in zip(*ranks, strict=True):
        rows: list[tuple[object, ...]] = []
        for (batch,) in step:
            inputs, targets = transform(batch)
            for index, image, mixed, target in zip(batch.indices.tolist(), batch.images, inputs, targets, strict=True):
                rows.append((store.read(index).key, target.tolist(), digest(image), digest(mixed)))
        yield rows


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (4, 1)])
def test_shards_and_betons_give_one_stream(both: Path, world_size: int, workers: int) -> None:
    settings = config(both, interpolation="bicubic")
    tar, beton = (open_store(replace(settings, format=form), "train") for form in ("tar", "ffcv"))
    assert (type(tar), type(beton)) == (TarStore, BetonStore)
    ours = list(stream(replace(settings, workers=workers), beton, world_size))
    assert ours == list(stream(settings, tar))
    assert len({row[0] for step in ours[:STEPS] for row in step}) == STEPS * 8
    assert len({row[2] for step in ours for row in step}) > STOP * 8 * 0.9


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_evaluation_shows_every_sample_once(both: Path, world_size: int) -> None:
    store = BetonStore(both, "val")
    shown = np.zeros(LABELS, int)
    for rank in range(world_size):
        for batch in EvalLoader(config(both, workers=rank % 2), store, rank=rank, world_size=world_size):
            shown += np.bincount(batch.labels[batch.mask], minlength=LABELS)
    assert shown.tolist() == np.bincount(store.labels).tolist()


def test_the_format_that_is_there_is_taken(jpg: Path, digits: Path, tmp_path: Path) -> None:
    assert type(open_store(config(jpg), "train")) is TarStore
    assert type(open_store(config(jpg, engine="ffcv"), "train")) is BetonStore
    assert "has no train.beton: repeat its `convneur prepare` with --format ffcv" in input_error(
        open_store, config(digits, format="ffcv"), "train"
    )
    alone = tmp_path / "alone"
    assert main(["prepare", "digits", "--out", str(alone), "--format", "ffcv"]) == 0
    assert type(open_store(config(alone), "train")) is BetonStore
    assert "FFCV's format alone: set data.format to ffcv" in input_error(
        open_store, config(alone, format="tar"), "train"
    )
    assert not list(alone.glob("*.tar"))
    assert "FFCV's format alone" in input_error(prepare_digits, alone, "both")
    assert not prepare_digits(alone, "ffcv")


def test_shards_get_betons_besides(digits: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    before = contents(folder)
    assert prepare_digits(folder, "ffcv")
    after = contents(folder)
    assert after.keys() - before.keys() == {
        f"{split}.{name}" for split in ("train", "val") for name in ("beton", "beton.crc32c.npy")
    }
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    assert not prepare_digits(folder, "both")
    assert contents(folder) == after
    assert "--beton-pixels jpg" in input_error(prepare_digits, folder, "both", "raw")
    tar, beton = TarStore(folder, "val"), BetonStore(folder, "val")
    assert all(
        np.array_equal(decode(tar.read(number).image), decode(beton.read(number).image)) for number in range(len(tar))
    )


@contextmanager
def files_limited(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a disk that is full for the large ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_interrupts_is_no_dataset_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    with files_limited(1 << 20):
        assert "train.beton" in input_error(prepare_digits, folder, "ffcv")
    assert len(list(folder.glob("*.tar"))) == 8
    assert not [*folder.glob("*.beton*"), *folder.glob(TEMPORARY)]
    for form in ("auto", "tar", "ffcv"):
        assert "holds no complete dataset yet" in input_error(open_store, config(folder, format=form), "train")
    assert prepare_digits(folder, "ffcv")
    prepare_digits(tmp_path / "whole", "ffcv")
    assert contents(folder) == contents(tmp_path / "whole")


def first_place(store: BetonStore, number: int) -> int:
    return int(store.images["data_ptr"][number])


def test_a_damaged_image_is_a_bad_sample(copy: Path) -> None:
    store = BetonStore(copy, "train")
    damage(store.path, first_place(store, 7) + 300)
    with pytest.raises(SampleError, match=rf"^{store.path}, split train, key s7: checksum mismatch, the file is damag"):
        store.read(7)
    assert store.read(6).key == "s6"
    loader = TrainLoader(config(copy), store, seed=0, rank=0, world_size=1, accumulation=1)
    assert 7 not in [index for (batch,) in loader.iterate(0, 3 * STEPS) for index in batch.indices.tolist()]
    assert list(loader.bad_samples) == [7]


def test_images_that_were_bad_in_the_shards_are_bad_in_the_beton(tmp_path: Path) -> None:
    bad = {3: b"no image", 8: b"", 11: images()[11][:600]}
    folder = write_dataset(tmp_path / "bad", "jpg", [bad.get(number, image) for number, image in enumerate(images())])
    streams = []
    for store in (TarStore(folder, "train"), BetonStore(folder, "train")):
        loader = TrainLoader(config(folder), store, seed=0, rank=0, world_size=1, accumulation=1)
        streams.append([(batch.indices.tolist(), digest(batch.images)) for (batch,) in loader.iterate(0, STOP)])
        assert set(loader.bad_samples) == set(bad)
        assert all("not a readable image" in reason for reason in loader.bad_samples.values())
    assert streams[0] == streams[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "train.beton").unlink(), "train.beton is missing"),
        (lambda folder: (folder / "train.beton").write_bytes(b""), "train.beton has 0 bytes"),
        (lambda folder: damage(folder / "train.beton", 10), "has other tables"),
        (lambda folder: damage(folder / "train.beton", 2200), "has other tables"),
        (lambda folder: damage(folder / "train.beton", -20), "has other tables"),
        (lambda folder: (folder / "train.beton.crc32c.npy").unlink(), "crc32c.npy is missing"),
        (lambda folder: damage(folder / "train.beton.crc32c.npy", -1), "crc32c.npy does not match"),
        (lambda folder: damage(folder / "train.index.npy", -1), "train.index.npy does not match"),
    ],
)
def test_damaged_files_are_refused(copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    assert message in input_error(BetonStore, copy, "train")
    assert len(BetonStore(copy, "val")) == PLAIN + 6


def test_a_beton_cut_short_while_it_is_read_ends_in_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convneur.data.stores.retry.DELAYS", (0.01,))
    store = BetonStore(copy, "train")
    with store.path.open("r+b") as file:
        file.truncate(first_place(store, 40))
    assert "train.beton can't be read (it ends within the sample" in input_error(store.read, 40)
    assert store.read(39).key == "s39"


def test_verify_denies_in_both_formats_what_is_bad_in_one(copy: Path) -> None:
    assert all(not found.denied and not found.shards for found in verify_dataset(copy, 2))
    store = BetonStore(copy, "train")
    damage(store.path, first_place(store, 7) + 300)
    damage(store.path, first_place(store, PLAIN + 2) + 100)
    train, val = verify_dataset(copy, 2)
    assert [(denied.key, denied.reason) for denied in train.denied] == [
        ("s7", "checksum mismatch"),
        (f"s{PLAIN + 2}", "checksum mismatch"),
    ]
    assert not val.denied
    tar, beton = TarStore(copy, "train"), BetonStore(copy, "train")
    assert len(beton) == len(tar) == PLAIN + 4
    assert [beton.read(number).key for number in range(len(beton))] == [
        tar.read(number).key for number in range(len(tar))
    ]
    assert list(stream(config(copy), beton)) == list(stream(config(copy), tar))


def test_verify_sees_what_lies_between_the_images(copy: Path) -> None:
    store = BetonStore(copy, "train")
    for place in (store._entry.beton.head + 5, store._entry.beton.table - 5):
        damage(store.path, place)
        train, val = verify_dataset(copy, 2)
        assert (train.denied, train.shards) == (
            (),
            ("train.beton: not the bytes that were written, between two images",),
        )
        assert not val.shards
        damage(store.path, place)  # undoes it
    assert not verify_dataset(copy, 2)[0].shards


def test_damaged_shards_make_no_beton(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", None, images())
    damage(folder / "train-000001.tar", 2000)
    message = input_error(add_betons, folder, "both", "jpg", 2)
    assert "train-000001.tar, key s9: checksum mismatch" in message
    assert not [*folder.glob("*.beton*"), *folder.glob(TEMPORARY)]


def test_without_ffcv_one_line_says_how_to_get_it(
    jpg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    assert "run `make setup`" in input_error(BetonStore, jpg, "train")
    assert main(["prepare", "digits", "--out", str(tmp_path / "digits"), "--format", "ffcv"]) == 2
    assert "FFCV is not installed here" in capsys.readouterr().err
    assert type(open_store(config(jpg), "train")) is TarStore


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"format": "tar"}, "data.format is tar"),
        ({"interpolation": "bicubic"}, "data.interpolation is bicubic"),
        ({"augment": AugmentConfig(randaugment="rand-m9-n2")}, "data.augment.randaugment is rand-m9-n2"),
        ({"augment": AugmentConfig(randaugment="", color_jitter=0.4)}, "data.augment.color_jitter is 0.4"),
    ],
)
def test_the_ffcv_engine_refuses_what_it_cannot_do(jpg: Path, settings: dict[str, object], key: str) -> None:
    able = config(jpg, engine="ffcv", interpolation="area", augment=AugmentConfig(randaugment="", vflip=0.5))
    check_data(able, num_classes=LABELS, world_size=2, accumulation=1)
    message = input_error(check_data, replace(able, **settings), num_classes=LABELS, world_size=2, accumulation=1)
    assert message.startswith(f"{key}: it must be ")
    assert "data.engine ffcv" in message
