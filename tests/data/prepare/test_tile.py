"""Tiled copies of datasets: the same stream, the same bytes however the work is divided, and nothing else touched."""

import io
import os
import shutil
import signal
import subprocess
import tarfile
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import google_crc32c
import numpy as np
import psutil
import pytest
from PIL import Image
from places import SLURM
from refusals import input_error

from convneur.data import native
from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import SampleError
from convneur.data.format.index import read_index
from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.format.tiled import DENIED, OUTCOMES, read_originals
from convneur.data.inspect.verify import verify_dataset
from convneur.data.native import SOURCES, library
from convneur.data.prepare import tiling, writing
from convneur.data.prepare.claim import LOCK
from convneur.data.prepare.foreign import prepare_index
from convneur.data.prepare.synthetic import SyntheticImages, prepare_synthetic
from convneur.data.prepare.tile import prepare_tile
from convneur.data.prepare.writing import Part
from convneur.data.stores.store import Store
from convneur.data.stores.tar import TarStore
from convneur.data.stream.train import TrainLoader
from convneur.data.views.decode import decode
from convneur.launch.cli import main

pytestmark = pytest.mark.skipif(library() is None, reason="THERE IS NO C++ COMPILER HERE")

PLAIN = 36
TWO = {"tiles": 2, "processes": 2}


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> list[tuple[bytes, str, bool]]:
    """Images, what becomes of them, and whether they are proven: photographs, and what ImageNet has besides."""
    plain = SyntheticImages("tile", PLAIN, 3, 64, 80)
    picture = Image.open(io.BytesIO(plain[0].image))
    return [
        *((plain[number].image, "tiled", True) for number in range(PLAIN)),
        (encoded(picture.convert("L"), "jpeg"), "tiled", True),
        (encoded(picture, "jpeg", subsampling=0, restart_marker_rows=1), "tiled", True),
        (encoded(picture, "jpeg", progressive=True), "a JPEG of another kind", True),
        (encoded(picture.convert("CMYK"), "jpeg"), "a JPEG of another kind", False),
        (encoded(picture, "png"), "no JPEG", False),
        (plain[1].image[:900], "damaged", False),
        (b"", "no JPEG", False),
    ]


IMAGES = images()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of both splits, 8 images in a shard."""
    folder = tmp_path_factory.mktemp("source") / "data"
    folder.mkdir()
    samples = [Sample(f"s{number}", image, number % 3) for number, (image, _, _) in enumerate(IMAGES)]
    splits = {
        "train": write_split(folder, "train", samples, extension="jpg", shard_samples=8),
        "val": write_split(folder, "val", samples[:5], extension="jpg", shard_samples=8),
    }
    Manifest("imagenet", tuple("abc"), splits).write(folder)
    return folder


@pytest.fixture(scope="module")
def tiled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiled") / "out"
    assert prepare_tile(source, out, tiles=2, processes=2) is True
    return out


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A copy of `source` that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def originals(folder: Path, split: str = "train") -> np.ndarray:
    found = read_originals(folder, split, Manifest.read(folder).splits[split])
    assert found is not None
    return found


def damage(folder: Path, key: str) -> None:
    """Changes a byte within an image's scan."""
    for path in folder.glob("train-*.tar"):
        with tarfile.open(path) as tar:
            if f"{key}.jpg" in tar.getnames():
                member = tar.getmember(f"{key}.jpg")
                content = bytearray(path.read_bytes())
                content[member.offset_data + member.size - 30] ^= 0x55
                path.write_bytes(content)
                return
    raise AssertionError(key)


def test_the_samples_are_the_same_and_it_is_known_what_they_were(source: Path, tiled: Path) -> None:
    ours, theirs, rows = TarStore(tiled, "train"), TarStore(source, "train"), originals(tiled)
    assert (ours.index_hash, ours.classes) == (theirs.index_hash, theirs.classes)
    assert np.array_equal(ours.shard_sizes, theirs.shard_sizes)
    for number, (image, outcome, proven) in enumerate(IMAGES):
        new, old = ours.read(number), theirs.read(number)
        assert (new.key, new.label, new.proven, old.proven) == (old.key, old.label, proven, False)
        assert (int(rows["crc32c"][number]), int(rows["size"][number])) == (google_crc32c.value(image), len(image))
        assert OUTCOMES[rows["outcome"][number]] == outcome
        assert (new.image != image) == (outcome == "tiled")
        if outcome == "tiled":
            assert np.array_equal(decode(new.image), decode(image))
            assert b"\xff\xdd\0\4" in new.image
        else:
            assert new.image == image
    tiles = Manifest.read(tiled).splits["train"].tiles
    assert tiles is not None
    assert (tiles.mcus, tiles.original_bytes) == (2, sum(len(image) for image, _, _ in IMAGES))
    assert tiles.outcomes == {"tiled": 38, "no JPEG": 2, "a JPEG of another kind": 2, "damaged": 1}


def stream(folder: Path, world_size: int) -> tuple[list[bytes], TrainLoader]:
    """Each step's pixels, labels and samples, and who was replaced."""
    config = DataConfig(
        root=str(folder),
        image_size=32,
        global_batch_size=8,
        lanes=4,
        window=2,
        workers=0,
        bad_limit=1000,
        augment=AugmentConfig(mixup=0, cutmix=0),
    )
    store: Store = TarStore(folder, "train")
    loaders = [
        TrainLoader(config, store, seed=5, rank=n, world_size=world_size, accumulation=1) for n in range(world_size)
    ]
    steps = []
    for step in zip(*(loader.iterate(0, 7) for loader in loaders), strict=True):
        parts = [
            (
                batch.images.contiguous().numpy(),
                batch.labels.numpy(),
                batch.indices.numpy(),
                [bad.number for bad in batch.bad],
            )
            for (batch,) in step
        ]
        steps.append(b"".join(np.asarray(part).tobytes() for field in zip(*parts, strict=True) for part in field))
    return steps, loaders[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_stream_is_the_same_to_the_bit_and_either_run_goes_on_with_the_other(
    source: Path, tiled: Path, world_size: int
) -> None:
    ours, loader = stream(tiled, world_size)
    theirs, other = stream(source, world_size)
    assert ours == theirs
    assert len(set(ours)) == 7
    loader.check_state(other.state(4))
    other.check_state(loader.state(4))


def test_all_ways_of_dividing_the_work_give_the_same_bytes(source: Path, tiled: Path, tmp_path: Path) -> None:
    before, expected = contents(source), contents(tiled)
    for number in (2, 3, 1):
        assert prepare_tile(source, tmp_path / "parts", tiles=2, processes=1, part=Part(number, 3))
        assert "holds no complete dataset" in input_error(lambda: TarStore(tmp_path / "parts", "train"))
    assert prepare_tile(source, tmp_path / "parts", tiles=2, processes=1) is True
    assert contents(tmp_path / "parts") == expected
    assert prepare_tile(source, tmp_path / "parts", tiles=2, processes=1) is False
    assert prepare_tile(source, tmp_path / "parts", tiles=2, processes=1, part=Part(1, 3)) is False
    assert contents(source) == before


@pytest.mark.slow
def test_an_array_job_and_a_job_after_it_do_the_same(source: Path, tiled: Path, tmp_path: Path) -> None:
    """The batch script, as Slurm runs it."""
    script = SLURM / "tile.sh"
    if not (script.parents[1] / ".venv/bin/convneur").exists():
        pytest.skip("the batch scripts run the checkout's .venv/bin/convneur")
    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    for job in (array | {"SLURM_ARRAY_TASK_ID": "2"}, array | {"SLURM_ARRAY_TASK_ID": "1"}, {}):
        words = ["bash", script, source, tmp_path / "out", "--tiles", "2"]
        subprocess.run(words, env=os.environ | {"SLURM_CPUS_PER_TASK": "1"} | job, cwd=tmp_path, check=True)
    assert contents(tmp_path / "out") == contents(tiled)


def test_killed_and_repeated_it_goes_on(
    source: Path, tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with SIGKILL at several moments: nothing half-written has a final name, and the end result is the same."""
    expected, out, once = contents(tiled), tmp_path / "out", tiling.tile
    with monkeypatch.context() as slowed:
        slowed.setattr(tiling, "tile", lambda *args: (time.sleep(0.02), once(*args))[1])
        for there in ("train-000000.originals.npy", "train-000000.tar", "train-000003.originals.npy"):
            process = get_context("fork").Process(target=prepare_tile, args=(source, out), kwargs=TWO)
            process.start()
            while not (out / there).exists():
                assert process.is_alive()
                time.sleep(0.002)
            assert process.pid is not None
            orphans = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert not psutil.wait_procs(orphans, timeout=600)[1], "they notice that their parent is gone"
            for name, content in contents(out).items():
                is_part = name.removesuffix(".originals.npy")[-1].isdigit() or name.endswith(".tmp")
                assert is_part or name in ("preparing", LOCK) or content == expected[name]
            assert "val-000000.tar" not in contents(out), "it was killed while it wrote"
    assert prepare_tile(source, out, tiles=2, processes=2) is True
    assert contents(out) == expected


def test_a_tiled_copy_of_a_tiled_copy_still_knows_the_originals(source: Path, tiled: Path, tmp_path: Path) -> None:
    prepare_tile(tiled, tmp_path / "again", tiles=4, processes=1)
    prepare_tile(source, tmp_path / "once", tiles=4, processes=1)
    again, once = contents(tmp_path / "again"), contents(tmp_path / "once")
    assert again == once
    assert again != contents(tiled)


def test_tiling_while_preparing_gives_the_same_shards_as_afterwards(tmp_path: Path) -> None:
    for tiles in (0, 3):
        prepare_synthetic(
            tmp_path / f"{tiles}", classes=3, images=20, height=33, width=50, processes=1, shard_samples=7, tiles=tiles
        )
    prepare_tile(tmp_path / "0", tmp_path / "after", tiles=3, processes=1)
    ours, theirs = contents(tmp_path / "3"), contents(tmp_path / "after")
    assert {name: ours[name] for name in ours if name != "manifest.json"} == {
        name: theirs[name] for name in theirs if name != "manifest.json"
    }
    splits = Manifest.read(tmp_path / "3").splits
    assert splits == Manifest.read(tmp_path / "after").splits
    assert splits["train"].index_hash == TarStore(tmp_path / "0", "train").index_hash


def test_shards_of_others_get_copies_with_the_same_order(
    source: Path, tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, out, again = tmp_path / "index", tmp_path / "out", tmp_path / "again"
    shards = {split: str(source / f"{split}-*.tar") for split in ("train", "val")}
    for split, names in shards.items():
        prepare_index(names, index, split=split, processes=1)
    with monkeypatch.context() as failing:
        failing.setattr(writing, "scan_tiled_shard", int)  # after the shards are written
        with pytest.raises(TypeError):
            prepare_index(shards["train"], out, split="train", processes=1, tiles=2)
    assert "holds the beginnings of split train" in input_error(
        prepare_index, shards["train"], out, split="train", processes=1, tiles=4
    )
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    for split, names in shards.items():
        prepare_index(names, out, split=split, processes=1, tiles=2)
    assert times.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items()
    prepare_tile(index, again, tiles=2, processes=1)
    assert Manifest.read(out).splits == Manifest.read(again).splits == Manifest.read(tiled).splits
    expected = contents(tiled)
    assert all(found == expected[name] for name, found in contents(out).items() if name != "manifest.json")
    assert contents(out).keys() == expected.keys()
    assert TarStore(out, "train").index_hash == TarStore(index, "train").index_hash
    assert "holds split val already" in input_error(
        prepare_index, shards["val"], out, split="val", processes=1, tiles=2
    )


def test_what_is_denied_stays_so_and_other_damage_is_refused(copy: Path, tmp_path: Path) -> None:
    damage(copy, "s3")
    message = input_error(prepare_tile, copy, tmp_path / "out", tiles=2, processes=1)
    assert "train-000000.tar, key s3: checksum mismatch" in message
    (found, _) = verify_dataset(copy, 1)
    assert [denied.key for denied in found.denied] == ["s3", "s41", "s42"]
    prepare_tile(copy, tmp_path / "out", tiles=2, processes=1)
    assert np.flatnonzero(originals(tmp_path / "out")["outcome"] == DENIED).tolist() == [3, 41, 42]
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert verify_dataset(tmp_path / "out", 1)[0].denied == found.denied, "the damaged image may well decode"
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert TarStore(tmp_path / "out", "train").index_hash == TarStore(copy, "train").index_hash


def test_damage_to_tiled_files_is_seen_and_verifying_keeps_the_hash(tiled: Path, source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiled, tmp_path / "folder"))
    before = TarStore(folder, "train").index_hash
    found = verify_dataset(folder, 1, source)[0]
    assert (len(found.denied), found.shards, found.tiled) == (2, (), 38)
    assert TarStore(folder, "train").index_hash != before
    damage(folder, "s7")
    with pytest.raises(SampleError, match="checksum mismatch"):
        TarStore(folder, "train").read(7)
    found = verify_dataset(folder, 1, source)[0]
    assert [denied.key for denied in found.denied] == ["s7", "s41", "s42"]
    assert [line.split(":")[0] for line in found.shards] == ["train-000000.tar", "train-000000.tar, key s7"]
    path = folder / "train.originals.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert "train.originals.npy does not match manifest.json" in input_error(TarStore, folder, "train")
    path.unlink()
    assert "train.originals.npy is missing" in input_error(TarStore, folder, "train")


def test_other_pixels_than_the_originals_are_found(tiled: Path, source: Path, tmp_path: Path) -> None:
    """A tiled image that is whole, but of another picture, as a faulty writer might make it."""
    folder = Path(shutil.copytree(tiled, tmp_path / "folder"))
    samples = [TarStore(folder, "train").read(number) for number in range(8)]
    samples[2] = samples[2]._replace(image=samples[5].image)
    manifest = Manifest.read(folder)
    made = write_split(tmp_path, "train", samples, extension="jpg", shard_samples=8)
    shutil.copy(tmp_path / "train-000000.tar", folder)
    split = manifest.splits["train"]
    index = np.array(read_index(folder, "train", split))
    index[:8] = read_index(tmp_path, "train", made)[list(index.dtype.names)].astype(index.dtype)
    np.save(folder / "train.index.npy", index)
    crc32c = google_crc32c.value((folder / "train.index.npy").read_bytes())
    split = replace(split, shards=(made.shards[0], *split.shards[1:]), index_crc32c=crc32c)
    replace(manifest, splits=manifest.splits | {"train": split}).write(folder)
    assert verify_dataset(folder, 1)[0].shards == ()
    assert verify_dataset(folder, 1, source)[0].shards == ("train-000000.tar, key s2: other pixels than the original",)


def test_the_command_line_says_it_before_and_after(
    source: Path, tiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["prepare", "tile", str(source), "--out", str(out), "--tiles", "2", "--processes", "1"]
    assert main([*words, "--part", "1/2"]) == 0
    assert "part 1/2 written; when all parts are, run the same command without --part" in capsys.readouterr().out
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "train: of the first 8 images 8 can be tiled, which changes their size by -" in output
    assert " a CPU-second\n" in output
    assert "train: 38 of 43 images tiled (kept as they are: 2 no JPEG, 2 a JPEG of another kind, 1 damaged), " in output
    assert contents(out) == contents(tiled)
    assert main(["data", "verify", str(out), "--against", str(source)]) == 1
    assert "val: 5 of 5 images intact, 5 of them tiled\n" in capsys.readouterr().out

    for wrong, expected in (
        ([*words[:6], "4"], "was written with --tiles 2, not with --tiles 4"),
        ([*words[:4], str(source), "--tiles", "2"], "holds the originals"),
        ([*words[:5], "--tiles", "0"], "--tiles is 0"),
        ([*words[:5], "--tiles", "65"], "--tiles is 65"),
        (words[:5], "--tiles"),
        (["prepare", "tile", str(tmp_path / "no"), "--out", "x", "--tiles", "4"], "does not exist"),
        (["data", "verify", str(source), "--against", str(out)], "has no tiled shards"),
        (["data", "verify", str(out), "--against", str(tmp_path)], "holds no complete dataset"),
    ):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert expected in error


def test_without_a_compiler_it_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "library", SOURCES.load)  # which hasn't been asked yet
    assert main(["prepare", "tile", str(source), "--out", str(tmp_path / "x"), "--tiles", "4"]) == 2
    assert capsys.readouterr().err == (
        "convneur: error: --tiles 4 needs a C++ compiler: there is no C++ compiler 'no-such-compiler'; install g++ "
        "(apt-get install g++), or set CXX\n"
    )
    assert not (tmp_path / "x").exists()
