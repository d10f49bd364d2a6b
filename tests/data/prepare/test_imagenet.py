"""ImageNet in the layouts people have it in, to shards: a small one of made images, with the real one's oddities."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image
from places import SLURM
from scipy.io import savemat
from torchvision.datasets.folder import pil_loader

from convneur.data.errors import InputError
from convneur.data.prepare.claim import LOCK
from convneur.data.prepare.imagenet import prepare_imagenet, shrink
from convneur.data.prepare.writing import Part
from convneur.data.stores.tar import TarStore
from convneur.data.views.decode import decode

WNIDS = ["n01440764", "n01443537", "n02084071", "n07754684"]
DEVKIT_ORDER = ["n02084071", "n01440764", "n07754684", "n01443537"]  # ILSVRC2012_ID 1, 2, ...
TRAIN_IMAGES, VAL_IMAGES = 13, 21  # a class, altogether


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def image(number: int) -> bytes:
    """What ImageNet holds under the name .JPEG: mostly JPEGs, and some that are something else."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    picture = small.resize((40 + number % 30, 50 - number % 20), Image.Resampling.BICUBIC)
    if number % 7 == 0:
        return encode(picture.convert("CMYK"), "jpeg")
    if number % 7 == 1:
        return encode(picture, "png")
    if number % 7 == 2:
        return encode(picture.convert("L"), "jpeg", quality=90)
    if number % 7 == 3:
        exif = Image.Exif()
        exif[0x0112] = 6  # "rotate by 90 degrees", which readers of ImageNet ignore
        exif[0x010E] = "x" * 3000
        return encode(picture, "jpeg", exif=exif)
    return encode(picture, "jpeg", quality=90, progressive=number % 7 == 4, subsampling=number % 3)


TRAIN = {
    f"{wnid}_{number}": (image(100 * label + number), label)
    for label, wnid in enumerate(WNIDS)
    for number in range(1, TRAIN_IMAGES + 1)
}
VAL = {f"ILSVRC2012_val_{number:08d}": (image(1000 + number), 7 * number % 4) for number in range(1, VAL_IMAGES + 1)}


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def devkit() -> dict[str, bytes]:
    """meta.mat as the real one: classes first, then groups of classes; one more class than numbers in a row."""
    kind = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
    ]
    rows = [(float(number), wnid, "words", "gloss", 0.0, []) for number, wnid in enumerate(DEVKIT_ORDER, 1)]
    rows.append((5.0, "n00001740", "entity", "gloss", 2.0, [1.0, 2.0]))
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    truth = "".join(f"{DEVKIT_ORDER.index(WNIDS[label]) + 1}\n" for _, label in VAL.values())
    return {"meta.mat": matrix.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official downloads: classes and images in no particular order."""
    folder = tmp_path_factory.mktemp("archives")
    classes = {
        f"{wnid}.tar": tar({f"{key}.JPEG": content for key, (content, label) in TRAIN.items() if WNIDS[label] == wnid})
        for wnid in DEVKIT_ORDER
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(
        tar({f"{key}.JPEG": content for key, (content, _) in reversed(VAL.items())})
    )
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, content in devkit().items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    for split, images in (("train", TRAIN), ("val", VAL)):
        for key, (content, label) in images.items():
            (folder / split / WNIDS[label]).mkdir(parents=True, exist_ok=True)
            (folder / split / WNIDS[label] / f"{key}.JPEG").write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def prepared(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "imagenet"
    assert prepare_imagenet(archives, out, processes=2, shard_samples=10) is True
    return out


def test_every_image_is_there_once_with_its_class_and_its_bytes(prepared: Path) -> None:
    for split, images in (("train", TRAIN), ("val", VAL)):
        store = TarStore(prepared, split)
        assert store.classes == tuple(WNIDS)
        samples = [store.read(number) for number in range(len(store))]
        assert {sample.key: (sample.image, sample.label) for sample in samples} == images
        assert len(samples) == len(images)
        assert store.shard_sizes.tolist() == [10] * (len(images) // 10) + [len(images) % 10]
    assert [store.read(number).key for number in range(len(store))] == list(VAL)
    labels = TarStore(prepared, "train").labels
    assert all(len(set(labels[first : first + 10])) >= 3 for first in range(0, 50, 10))  # classes are mixed


def test_shards_are_webdatasets(prepared: Path) -> None:
    urls = sorted(map(str, prepared.glob("train-*.tar")))
    assert [Path(url).name for url in urls] == [f"train-{number:06d}.tar" for number in range(6)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in samples} == TRAIN


def test_oddities_decode_as_torchvision_reads_the_file(prepared: Path, folders: Path) -> None:
    store = TarStore(prepared, "train")
    modes = set()
    for number in range(len(store)):
        sample = store.read(number)
        expected = pil_loader(str(folders / "train" / WNIDS[sample.label] / f"{sample.key}.JPEG"))
        decoded = decode(sample.image)
        assert np.array_equal(decoded, np.asarray(expected))
        original = Image.open(io.BytesIO(sample.image))
        modes.add((original.format, original.mode, bool(original.getexif())))
    assert modes == {
        ("JPEG", "CMYK", False),
        ("PNG", "RGB", False),
        ("JPEG", "L", False),
        ("JPEG", "RGB", True),
        ("JPEG", "RGB", False),
    }


def test_both_layouts_and_all_divisions_of_the_work_give_the_same_bytes(
    prepared: Path, archives: Path, folders: Path, tmp_path: Path
) -> None:
    expected = contents(prepared)
    prepare_imagenet(folders, tmp_path / "folders", processes=1, shard_samples=10)
    assert contents(tmp_path / "folders") == expected

    out = tmp_path / "parts"
    for number in (3, 1, 2):
        assert prepare_imagenet(archives, out, processes=1, shard_samples=10, part=Part(number, 3))
        with pytest.raises(InputError, match="holds no complete dataset"):
            TarStore(out, "train")
    assert {name for name in contents(out) if name.endswith(".tar")} == {
        name for name in expected if name.endswith(".tar")
    }
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert prepare_imagenet(archives, out, processes=2, shard_samples=10) is True
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == times
    assert contents(out) == expected
    assert prepare_imagenet(archives, out, processes=2, shard_samples=10) is False


def test_an_array_job_and_a_job_after_it_do_the_same(archives: Path, tmp_path: Path) -> None:
    """The batch script, as Slurm runs it: the tasks of an array, then a job that isn't one."""
    script = SLURM / "prepare_imagenet.sh"
    if not (script.parents[1] / ".venv/bin/convneur").exists():
        pytest.skip("the batch scripts run the checkout's .venv/bin/convneur")

    def job(**env: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", script, archives, tmp_path / "out", "--max-side", "50"]
        return subprocess.run(words, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, timeout=1200)

    array = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    for task in ("2", "1"):
        result = job(SLURM_ARRAY_TASK_ID=task, SLURM_CPUS_PER_TASK="1", **array)
        assert f"part {task}/2 written" in result.stdout, result.stderr
    assert job().returncode == 0
    prepare_imagenet(archives, tmp_path / "expected", processes=1, max_side=50)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    result = job(SLURM_ARRAY_TASK_ID="0", **array | {"SLURM_ARRAY_TASK_MIN": "0"})
    assert (result.returncode, result.stderr) == (2, "slurm: --array is 0-2, expected 1-N\n")


def test_an_unpacked_devkit_and_a_mix_of_layouts_do(
    archives: Path, folders: Path, prepared: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
    for name, content in devkit().items():
        (source / "ILSVRC2012_devkit_t12" / "data" / name).write_bytes(content)
    (source / "train").symlink_to(folders / "train")
    (source / "ILSVRC2012_img_val.tar").symlink_to(archives / "ILSVRC2012_img_val.tar")
    prepare_imagenet(source, tmp_path / "out", processes=1, shard_samples=10)
    assert contents(tmp_path / "out") == contents(prepared)


def test_killed_and_repeated_it_goes_on(prepared: Path, archives: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL at several moments: nothing half-written has a final name, and the end result is the same."""
    expected, out = contents(prepared), tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path; from convneur.data.prepare import imagenet, writing\n"
        "write = writing.write_shard\n"
        "writing.write_shard = lambda *args: (time.sleep(0.05), write(*args))\n"
        "print('go', flush=True)\n"
        "imagenet.prepare_imagenet(Path(sys.argv[1]), Path(sys.argv[2]), processes=2, shard_samples=10)"
    )
    for delay in (0.05, 0.15, 0.3):
        process = subprocess.Popen([sys.executable, "-c", script, archives, out], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(delay)
        orphans = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for name, content in contents(out).items() if out.exists() else ():
            assert name.endswith(".tmp") or name in ("preparing", LOCK) or content == expected[name]
    assert not psutil.wait_procs(orphans, timeout=600)[1], "they notice that their parent is gone"
    prepare_imagenet(archives, out, processes=2, shard_samples=10)
    assert contents(out) == expected


def test_other_options_do_not_continue_what_was_begun(archives: Path, tmp_path: Path) -> None:
    prepare_imagenet(archives, tmp_path, processes=1, shard_samples=10, part=Part(1, 2))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"^.* holds the beginnings of a dataset of imagenet from other images"):
        prepare_imagenet(archives, tmp_path, processes=1, shard_samples=10, max_side=30)
    assert contents(tmp_path) == before


def test_large_images_can_be_scaled_down(archives: Path, tmp_path: Path) -> None:
    prepare_imagenet(archives, tmp_path, processes=2, shard_samples=10, max_side=50)
    store = TarStore(tmp_path, "train")
    changed = 0
    for number in range(len(store)):
        sample = store.read(number)
        original = Image.fromarray(decode(TRAIN[sample.key][0]))
        ours = Image.fromarray(decode(sample.image))
        assert max(ours.size) == min(max(original.size), 50)
        if max(original.size) <= 50:
            assert sample.image == TRAIN[sample.key][0]
        else:
            changed += 1
            assert abs(ours.width / ours.height - original.width / original.height) < 0.05
            difference = np.asarray(ours, float) - np.asarray(original.resize(ours.size, Image.Resampling.LANCZOS))
            assert np.abs(difference).mean() < 8
    assert 10 < changed < 45
    assert shrink(b"no image", 10) == b"no image"


def lose_devkit(source: Path) -> None:
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()


def cut(name: str, share: float) -> object:
    def damage(source: Path) -> None:
        os.truncate(source / name, int((source / name).stat().st_size * share))

    damage.__name__ = f"cut {name} at {share}"
    return damage


def flip_header(source: Path) -> None:
    """In the header of an image within a class's archive: tarfile alone would skip the rest of the class in silence."""
    path = source / "ILSVRC2012_img_train.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"n01443537_5.JPEG") + 130] ^= 1
    path.write_bytes(content)


def other_truth(source: Path) -> None:
    (source / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
    files = devkit() | {"ILSVRC2012_validation_ground_truth.txt": b"1\n" * 20}
    for name, content in files.items():
        (source / "ILSVRC2012_devkit_t12" / "data" / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "is no folder"),
        (lambda source: (source / "ILSVRC2012_img_train.tar").unlink(), "neither ILSVRC2012_img_train.tar nor"),
        (lambda source: (source / "ILSVRC2012_img_val.tar").unlink(), "neither ILSVRC2012_img_val.tar nor"),
        (lose_devkit, "has no ILSVRC2012_devkit_t12.tar.gz"),
        (cut("ILSVRC2012_img_train.tar", 0.3), "ILSVRC2012_img_train.tar is not a whole tar file"),
        (cut("ILSVRC2012_img_train.tar", 0.7), "ILSVRC2012_img_train.tar is not a whole tar file"),
        (cut("ILSVRC2012_img_train.tar", 0.0), "ILSVRC2012_img_train.tar is not a whole tar file"),
        (cut("ILSVRC2012_img_val.tar", 0.5), "ILSVRC2012_img_val.tar is not a whole tar file"),
        (cut("ILSVRC2012_devkit_t12.tar.gz", 0.5), "ILSVRC2012_devkit_t12.tar.gz can't be read"),
        (flip_header, "ILSVRC2012_img_train.tar is not a whole tar file"),
        (other_truth, "holds 21 images, but ILSVRC2012_devkit_t12 has classes of 20"),
    ],
)
def test_a_damaged_download_is_named_in_one_line(archives: Path, tmp_path: Path, damage: object, expected: str) -> None:
    source = Path(shutil.copytree(archives, tmp_path / "source"))
    damage(source)
    with pytest.raises(InputError) as caught:
        prepare_imagenet(source, tmp_path / "out", processes=2, shard_samples=10)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_is_one_line_and_can_be_continued(prepared: Path, archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("this machine doesn't let root mount a tmpfs")
    try:
        with pytest.raises(InputError, match=r"^writing train: .*No space left on device.*run the command again.*$"):
            prepare_imagenet(archives, out, processes=2, shard_samples=10)
        assert "manifest.json" not in contents(out)
        subprocess.run(["mount", "-o", "remount,size=4m", out], check=True)
        prepare_imagenet(archives, out, processes=2, shard_samples=10)
        assert contents(out) == contents(prepared)
    finally:
        subprocess.run(["umount", out], check=True)
