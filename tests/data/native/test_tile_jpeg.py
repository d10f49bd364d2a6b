"""JPEGs rewritten with restart markers: the same pixels, the same segments, and nothing but refusals for damage."""

import io
import shutil
import subprocess
from itertools import product

import numpy as np
import pytest
from PIL import Image

from convneur.data.native import library
from convneur.data.native.tile import tile_jpeg
from convneur.data.prepare.synthetic import SyntheticImages
from convneur.data.views.decode import decode_plain_jpeg

pytestmark = pytest.mark.skipif(library() is None, reason="THERE IS NO C++ COMPILER HERE")

SIZES = [(5, 1), (7, 33), (16, 16), (64, 48), (130, 101)]


def picture(width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(SyntheticImages("tile", 1, 2, height, width)[0].image))


def jpeg(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", **{"quality": 90} | options)
    return buffer.getvalue()


def segments(image: bytes) -> list[tuple[int, bytes]]:
    """Markers and contents up to the scan."""
    found, at = [], 2
    while True:
        length = int.from_bytes(image[at + 2 : at + 4])
        found.append((image[at + 1], image[at + 4 : at + 2 + length]))
        at += 2 + length
        if found[-1][0] == 0xDA:
            return found


def interval(image: bytes) -> int:
    return int.from_bytes(dict(segments(image)).get(0xDD, b""))


def pixels(image: bytes | None) -> np.ndarray:
    assert image is not None
    found = decode_plain_jpeg(image)
    assert found is not None, "libjpeg-turbo complains of it"
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_stay_and_a_rewritten_file_is_rewritten_to_itself(size: tuple[int, int]) -> None:
    base = picture(*size)
    options: list[dict[str, object]] = [
        {},
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"restart_marker_rows": 1, "optimize": True},
        {"quality": 100},
        {"quality": 3},
    ]
    for mode, subsampling, more in product(["RGB", "L"], (0, 1, 2), options):
        original = jpeg(base.convert(mode), subsampling=subsampling, **more)
        for mcus in (1, 4):
            tiled = tile_jpeg(original, mcus)
            assert np.array_equal(pixels(tiled), pixels(original))
            assert tile_jpeg(tiled, mcus) == tiled
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    original = jpeg(noise, quality=100, subsampling=0)
    assert np.array_equal(pixels(tile_jpeg(original, 1)), pixels(original)), "all symbols, and the longest codes"


@pytest.mark.parametrize(
    ("width", "subsampling", "mcus", "expected"),
    [
        (500, 2, 4, 4),  # 32 across
        (375, 2, 4, 4),  # 24
        (333, 2, 4, 3),  # 21
        (400, 2, 4, 5),  # 25: 1, or 5
        (272, 2, 4, 5),  # 17: no divisor
        (40, 2, 4, 3),  # the whole row
        (500, 0, 4, 7),  # 63 of half the blocks
        (375, 0, 4, 8),  # 47: no divisor
        (500, 2, 64, 32),
    ],
)
def test_markers_form_columns_where_they_can(width: int, subsampling: int, mcus: int, expected: int) -> None:
    tiled = tile_jpeg(jpeg(picture(width, 20), subsampling=subsampling), mcus)
    assert tiled is not None
    assert interval(tiled) == expected


def test_other_segments_stay_byte_by_byte_and_so_does_what_follows() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 300
    original = jpeg(picture(90, 70), exif=exif, icc_profile=b"p" * 300, comment=b"said", restart_marker_rows=1)
    original = original.replace(b"\xff\xd9", b"\xff\xd9more\xff\xd8\0")
    tiled = tile_jpeg(original, 2)
    assert tiled is not None
    kept = [one for one in segments(original) if one[0] not in (0xC4, 0xDD)]
    assert [one for one in segments(tiled) if one[0] not in (0xC4, 0xDD)] == kept
    assert {marker for marker, _ in kept} >= {0xE0, 0xE1, 0xE2, 0xFE}
    assert tiled.endswith(b"\xff\xd9more\xff\xd8\0")
    assert np.array_equal(pixels(tiled), pixels(original))


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran isn't installed")
def test_jpegtran_makes_files_of_the_same_size_and_ours_of_its_own() -> None:
    def jpegtran(image: bytes, restart: str) -> bytes:
        words = ["jpegtran", "-restart", restart, "-optimize", "-copy", "all"]
        return subprocess.run(words, input=image, capture_output=True, check=True).stdout

    for subsampling, mcus in ((2, 4), (0, 8)):
        original = jpeg(picture(256, 100), subsampling=subsampling)
        theirs, ours = jpegtran(original, f"{mcus}B"), tile_jpeg(original, 4)
        assert ours is not None
        assert len(ours) == len(theirs)
        assert tile_jpeg(jpegtran(original, "1"), 4) == tile_jpeg(theirs, 4) == ours


def test_other_files_are_not_taken() -> None:
    base = picture(50, 40)
    for image in (
        b"",
        b"\xff\xd8",
        b"no image",
        jpeg(base, progressive=True),
        jpeg(base.convert("CMYK")),
        jpeg(base)[:-300],
        jpeg(base).replace(b"\xff\xc4", b"\xff\xc5"),
    ):
        assert tile_jpeg(image, 4) is None


def test_damage_is_refused_or_decodes_to_equal_pixels() -> None:
    """Whatever is taken of a damaged file is what libjpeg-turbo makes of it, if it takes it without complaint."""
    random, originals = np.random.default_rng(1), [jpeg(picture(70, 50), subsampling=number) for number in (0, 2)]
    taken = 0
    for number in range(600):
        content = bytearray(originals[number % 2])
        for place in random.integers(2, len(content), 1 + number % 3):
            content[place] = random.integers(256)
        damaged = bytes(content[: random.integers(len(content))] if number % 5 == 0 else content)
        tiled, expected = tile_jpeg(damaged, 4), decode_plain_jpeg(damaged)
        if tiled is not None and expected is not None:
            taken += 1
            assert np.array_equal(pixels(tiled), expected)
    assert taken > 20
