"""JPEGs decoded in C++ have the pixels that simplejpeg gives, and none is taken that it refuses."""

import io
import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import simplejpeg
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from places import ROOT

from convneur.data import native
from convneur.data.native import SOURCES
from convneur.data.native.jpeg import decode_jpeg
from convneur.data.native.pixels import Box
from convneur.data.prepare.synthetic import SyntheticImages

NATIVE = ROOT / "data" / "native"
PHOTOGRAPHS = [
    *(Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"),
    *(Path(matplotlib.__file__).parent / "mpl-data" / "sample_data").glob("*.jpg"),
]
SUBSAMPLINGS = {"444": 0, "422": 1, "420": 2}


@cache
def picture(height: int, width: int) -> Image.Image:
    """Clouds, ellipses and grain."""
    image = SyntheticImages("train", 2, 2, max(height, 16), max(width, 16))[height % 2][1]
    return Image.open(io.BytesIO(image)).convert("RGB").crop((0, 0, width, height))


def encoded(
    image: Image.Image, subsampling: str = "420", quality: int = 90, interval: int = 0, **more: object
) -> bytes:
    """A JPEG with a restart marker each `interval` MCUs."""
    buffer = io.BytesIO()
    image = image.convert("L") if subsampling == "grey" else image
    more |= {"restart_marker_blocks": interval} if interval else {}
    image.save(buffer, "jpeg", quality=quality, subsampling=SUBSAMPLINGS.get(subsampling, 0), **more)
    return buffer.getvalue()


def some_box(height: int, width: int) -> Box:
    top, left = random.randrange(height), random.randrange(width)
    return Box(top, left, random.randint(1, height - top), random.randint(1, width - left))


def decoded(image: bytes, box: Box, proven: bool = False) -> np.ndarray | None:
    """A rectangle's pixels, None if it isn't taken; sees that what lies between the rows stays as it is."""
    room = np.full((box.height, box.width + 3, 3), 165, np.uint8)
    taken = decode_jpeg(image, proven, box, room[:, : box.width])
    assert (room[:, box.width :] == 165).all()
    return room[:, : box.width] if taken else None


def assert_right(image: bytes, crops: int = 3) -> None:
    pixels = simplejpeg.decode_jpeg(image)
    height, width = pixels.shape[:2]
    for box in [Box(0, 0, height, width), *(some_box(height, width) for _ in range(crops))]:
        wanted = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        for proven in (False, True):
            made = decoded(image, box, proven)
            assert made is not None
            assert np.array_equal(made, wanted), (pixels.shape, box, proven)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random rectangles for each of the libraries."""
    random.seed(0)


@pytest.mark.usefixtures("each_build")
@pytest.mark.parametrize("subsampling", ["420", "422", "444", "grey"])
def test_images_of_all_sizes_have_simplejpegs_pixels(subsampling: str) -> None:
    sizes = [(1, 5), (2, 6), (3, 5), (7, 8), (9, 17), (16, 15), (31, 33), (64, 65), (1, 70), (90, 7), (41, 64)]
    if subsampling in ("444", "grey"):
        sizes += [(1, 1), (2, 2), (90, 2), (41, 4)]
    for height, width in sizes:
        quality, interval = random.choice([1, 30, 75, 90, 95, 100]), random.choice([0, 1, 2, 5])
        assert_right(encoded(picture(height, width), subsampling, quality, interval, optimize=random.random() < 0.5))


@pytest.mark.usefixtures("each_build")
def test_photographs_have_simplejpegs_pixels() -> None:
    assert len(PHOTOGRAPHS) >= 3
    for path in PHOTOGRAPHS:
        assert_right(path.read_bytes())
    for subsampling in SUBSAMPLINGS:
        for quality in (50, 90, 98):
            interval = random.choice([0, 1, 4, 8])
            assert_right(encoded(picture(187, 250), subsampling, quality, interval, optimize=bool(interval)))


@pytest.mark.usefixtures("each_build")
def test_coefficients_that_no_camera_makes_wrap_around_as_libjpeg_turbos_do() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (64, 64, 3), dtype=np.uint8) * 255
    columns = np.tile(noise[:1], (64, 1, 1))  # blocks with nothing below the first row
    for pixels, subsampling in product((noise, columns), ("420", "444", "grey")):
        image = bytearray(encoded(Image.fromarray(pixels), subsampling, 100))
        for at in range(len(image)):
            if image[at : at + 2] == b"\xff\xdb":
                image[at + 5 : at + 69] = bytes([255]) * 64
        assert_right(bytes(image))


def segment(code: int, data: bytes) -> bytes:
    return bytes([0xFF, code]) + (len(data) + 2).to_bytes(2, "big") + data


def after_start(image: bytes, *added: bytes) -> bytes:
    """With segments before what there was."""
    return image[:2] + b"".join(added) + image[2:]


PLAIN, TILED = encoded(picture(48, 64)), encoded(picture(48, 64), interval=2)
PROFILE = b"ICC_PROFILE\0"


def without_jfif(image: bytes) -> bytes:
    return image[:2] + image[20:]


def with_ids(image: bytes, ids: bytes) -> bytes:
    """With other names of the components."""
    changed = bytearray(image)
    frame, scan = image.index(b"\xff\xc0"), image.index(b"\xff\xda")
    changed[frame + 10 : frame + 19 : 3] = changed[scan + 5 : scan + 11 : 2] = ids
    return bytes(changed)


@pytest.mark.parametrize(
    "image",
    [
        PLAIN + b"more",
        after_start(PLAIN, segment(0xFE, b"said"), segment(0xE1, b"Exif\0\0"), segment(0xED, b"")),
        after_start(PLAIN, segment(0xE2, PROFILE + b"\1\1a")),
        without_jfif(PLAIN),
        with_ids(without_jfif(PLAIN), b"\0\1\2"),
        after_start(without_jfif(PLAIN), segment(0xEE, b"Adobe\0d\0\0\0\0\1")),
        encoded(picture(48, 64), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    ],
)
def test_what_photographs_come_with_is_taken(image: bytes) -> None:
    assert_right(image)


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\xff",
        b"\xff\xd8\xff",
        PLAIN[:-2],
        PLAIN[:-1],
        PLAIN[:-20] + PLAIN[-2:],
        PLAIN[:-2] + b"\0\xff\xd9",
        PLAIN[:-2] + b"\xff\xfe\0\2\xff\xd9",
        TILED.replace(b"\xff\xd2", b"\xff\xd3"),
        TILED.replace(b"\xff\xd2", b""),
        TILED.replace(b"\xff\xd2", b"\0\xff\xd2"),
        TILED.replace(b"\xff\xd2", b"\xff\xd2\xff\xd3"),
        after_start(PLAIN, b"\0"),
        after_start(PLAIN, b"\xff\xff\xff"),
        PLAIN[:-2] + b"\xff\xff\xff\xd9",
        PLAIN.replace(b"\xff\xc0", b"\xff\xc1"),
        encoded(picture(48, 4)),
        simplejpeg.encode_jpeg(np.array(picture(48, 64)), colorsubsampling="440"),
        after_start(PLAIN, segment(0xEE, b"Adobe\0d\0\0\0\0\0")),
        after_start(PLAIN, segment(0xE2, PROFILE + b"\2\2b"), segment(0xE2, PROFILE + b"\1\2a")),
        after_start(PLAIN, segment(0xE2, PROFILE + b"\1\1a"), segment(0xE2, PROFILE + b"\1\1a")),
        after_start(without_jfif(PLAIN), segment(0xEE, b"Adobe\0d\0\0\0\0\0")),
        after_start(without_jfif(PLAIN), segment(0xEE, b"Adobe\0d\0\0\0\0\2")),
        after_start(PLAIN, segment(0xE2, PROFILE + b"\1\2a")),
        after_start(PLAIN, segment(0xE2, PROFILE + b"\1\1")),
        after_start(PLAIN, segment(0xE0, b"JFIF\0\2\1\0\0\1\0\1\0\0")),
        encoded(picture(48, 64), progressive=True),
        with_ids(without_jfif(PLAIN), b"RGB"),
        with_ids(PLAIN, b"\1\2\2"),
        encoded(picture(48, 64).convert("CMYK")),
        simplejpeg.encode_jpeg(np.array(picture(48, 64)), colorsubsampling="411"),
        PLAIN.replace(b"\xff\xda", b"\xff\xc0"),
    ],
)
def test_what_is_odd_or_of_another_kind_is_not_taken(image: bytes) -> None:
    for box in (Box(0, 0, 48, 64), Box(40, 60, 8, 4), Box(0, 0, 48, 4), Box(0, 0, 1, 1)):
        assert decoded(image, box) is None


def test_rectangles_outside_the_image_are_not_taken() -> None:
    for box in [Box(-1, 0, 4, 4), Box(0, -1, 4, 4), Box(45, 0, 4, 4), Box(0, 61, 4, 4), Box(0, 0, 0, 4)]:
        assert decoded(PLAIN, box) is None
    with pytest.raises(ValueError, match=r"out of shape \(4, 5, 3\), uint8: expected uint8 of \(4, 4, 3\)"):
        decode_jpeg(PLAIN, False, Box(0, 0, 4, 4), np.empty((4, 5, 3), np.uint8))


def test_no_image_is_taken_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    assert decoded(PLAIN, Box(0, 0, 4, 4)) is None


def test_of_proven_files_only_what_is_needed_is_read() -> None:
    image = TILED.replace(b"\xff\xd4", b"\0\0\xff\xd4")  # bytes too many in the last third
    assert decoded(image, Box(0, 0, 16, 64)) is None
    made = decoded(image, Box(0, 0, 16, 64), proven=True)
    assert made is not None
    assert np.array_equal(made, simplejpeg.decode_jpeg(TILED)[:16])
    renumbered = TILED.replace(b"\xff\xd3", b"\xff\xd4")
    assert decoded(renumbered, Box(0, 0, 16, 64), proven=True) is None


def test_threads_decode_side_by_side() -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(assert_right, [PLAIN, TILED, encoded(picture(31, 33), "444", optimize=True)] * 6))


SEEDS = [
    PLAIN,
    TILED,
    encoded(picture(33, 40), "444", 95, optimize=True),
    encoded(picture(33, 40), "422", 60, interval=1),
    encoded(picture(33, 40), "grey", 80),
]


@settings(max_examples=int(os.environ.get("CONVNEUR_FUZZ_INPUTS", "500")), deadline=None, database=None)
@given(seed=st.sampled_from(SEEDS), data=st.data(), where=st.integers(0, 2**32))
def test_damaged_files_are_taken_only_if_simplejpeg_takes_them(seed: bytes, data: st.DataObject, where: int) -> None:
    image = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(2, len(image) - 1))
        length = data.draw(st.integers(0, 3))
        image[at : at + length] = data.draw(st.binary(max_size=3))
    random.seed(where)
    height, width = 48 if seed in (PLAIN, TILED) else 33, 64 if seed in (PLAIN, TILED) else 40
    try:
        height, width = simplejpeg.decode_jpeg_header(bytes(image))[:2]
        pixels = simplejpeg.decode_jpeg(bytes(image)) if height * width < 2**18 else None
    except ValueError:
        pixels = None
    if height * width >= 2**18:
        return
    boxes = [Box(0, 0, height, width), some_box(height, width), some_box(height, width)]
    made = [decoded(bytes(image), box) for box in boxes]
    assert len({one is None for one in made}) == 1
    for box, one in zip(boxes, made, strict=True):
        if one is not None:
            assert pixels is not None
            assert np.array_equal(one, pixels[box.top : box.top + box.height, box.left : box.left + box.width])


def merged(image: bytes) -> bytes:
    """With all tables in one segment of their kind, before the others."""
    kinds: dict[int, bytes] = {0xDB: b"", 0xC4: b""}
    rest, at = b"", 2
    while image[at + 1] != 0xDA:
        code, end = image[at + 1], at + 2 + int.from_bytes(image[at + 2 : at + 4], "big")
        if code in kinds:
            kinds[code] += image[at + 4 : end]
        else:
            rest += image[at:end]
        at = end
    return image[:2] + b"".join(segment(*kind) for kind in kinds.items()) + rest + image[at:]


def fuzz_seeds() -> list[bytes]:
    """Small files of all kinds that are taken."""
    exif = Image.Exif()
    exif[0x010E] = "said"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    seeds = [encoded(picture(32, 40), exif=exif, icc_profile=profile, comment=b"said")]
    for number, subsampling in enumerate(["420", "422", "444", "grey"]):
        for interval in (0, 1, 3):
            height, width = 75 - 11 * number - 3 * interval, 100 - 19 * number - interval
            quality = (90, 95, 60, 30)[(number + interval) % 4]
            image = encoded(picture(height, width), subsampling, quality, interval, optimize=interval == 3)
            seeds.append(merged(image) if interval == 1 else image)
    return seeds


def fuzzed(folder: Path, inputs: int, *flags: str) -> str:
    """What the harness says, compiled with sanitizers, of so many damaged files."""
    for number, seed in enumerate(fuzz_seeds()):
        (folder / f"{number}.jpg").write_bytes(seed)
    made = folder / "fuzz_jpeg"
    files = [ROOT / "tests" / "support" / "native" / "fuzz_jpeg.cpp", NATIVE / "jpeg.cpp", NATIVE / "tile.cpp"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}"]
    command = SOURCES._replace(files=files, flags=["-march=native", *checks, *flags]).command(made)
    subprocess.run([part for part in command if part not in ("-shared", "-fPIC")], check=True)
    seed = os.environ.get("CONVNEUR_FUZZ_SEED", "0")
    run = [str(made), seed, str(inputs), *sorted(map(str, folder.glob("*.jpg")))]
    ended = subprocess.run(run, stdout=subprocess.PIPE, text=True)
    assert ended.returncode == 0, f"of seed {seed}"
    print(ended.stdout)
    return ended.stdout


def test_damaged_files_do_no_harm(tmp_path: Path) -> None:
    assert int(fuzzed(tmp_path, 2000).split()[0]) > 100


@pytest.mark.slow
def test_many_damaged_files_do_no_harm(tmp_path: Path) -> None:
    inputs = int(os.environ.get("CONVNEUR_FUZZ_INPUTS", "300000"))
    assert int(fuzzed(tmp_path, inputs, "-O2", "-g").split()[0]) > inputs // 50
