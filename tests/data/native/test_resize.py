"""Resizing in C++ gives the bits of Pillow and OpenCV."""

import random
import subprocess
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
from PIL import Image
from places import ROOT

from convneur.data.compiled import compiler
from convneur.data.native import FOLDER, SOURCES, pixels
from convneur.data.native.pixels import Box, Filter, resize, resize_support

cv2.setNumThreads(0)

PARTS = ["affine", "area", "blur", "operations", "passes", "resize", "tones", "weights"]
"""What the harness of the sanitizers is linked with."""


@pytest.fixture(autouse=True)
def drawn() -> None:
    random.seed(0)


def noise(rows: int, columns: int) -> np.ndarray:
    """Pixels with a stride, half the time only 0 and 255, where filters clip."""
    values = np.random.default_rng(random.randrange(2**32)).integers(0, 256, (rows + 3, columns + 5, 3), dtype=np.uint8)
    values = np.where(values > 127, 255, 0).astype(np.uint8) if random.random() < 0.5 else values
    return values[1 : rows + 1, 2 : columns + 2]


def reference(image: np.ndarray, height: int, width: int, how: Filter) -> np.ndarray:
    if how == "area":
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.array(Image.fromarray(image).resize((width, height), pixels.RESAMPLINGS[how]))


def some_sizes(how: Filter) -> tuple[int, int, int, int]:
    """Heights and widths before and after, of all kinds: by a pixel or 700, in one or both directions, whole ratios."""
    most = random.choice([4, 40, 40, 224])
    height, width = random.randint(1, most), random.randint(1, most)
    rows, columns = random.randint(1, 3 * most), random.randint(1, 3 * most)
    kind = random.randrange(6)
    if kind == 0:
        rows = height
    elif kind == 1:
        columns = width
    elif kind == 2:
        rows, columns = height * random.randint(1, 4), width * random.randint(1, 4)
    elif kind == 3 and how != "area":  # about where Pillow changes the order of its passes
        columns = width + random.randint(0, 20)
        rows = max(1, height + 2 * (columns - width) + random.randint(-2, 2))
    return rows, columns, height, width


def some_window(height: int, width: int) -> Box:
    top, left = random.randrange(height), random.randrange(width)
    return Box(top, left, random.randint(1, height - top), random.randint(1, width - left))


@pytest.mark.usefixtures("each_build")
@pytest.mark.parametrize("how", get_args(Filter))
def test_windows_of_all_sizes_are_the_reference(how: Filter) -> None:
    for _ in range(80):
        rows, columns, height, width = some_sizes(how)
        image, window = noise(rows, columns), some_window(height, width)
        flips = (random.random() < 0.5, random.random() < 0.5)
        top, left, *size = window
        expected = reference(image, height, width, how)[top : top + size[0], left : left + size[1]]
        expected = expected[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
        made = resize(image, height, width, how, window, flips)
        assert np.array_equal(made, expected), (rows, columns, height, width, window, flips)


@pytest.mark.parametrize("how", get_args(Filter))
@pytest.mark.parametrize(("rows", "columns"), [(1, 700), (700, 1), (2, 1), (1, 1), (699, 431), (37, 701)])
def test_extreme_shapes_are_the_reference(how: Filter, rows: int, columns: int) -> None:
    image = noise(rows, columns)
    for height, width in [(224, 224), (1, 1), (rows, columns), (1, 300), (160, 3)]:
        assert np.array_equal(resize(image, height, width, how), reference(image, height, width, how)), (height, width)


@pytest.mark.parametrize("how", get_args(Filter))
def test_the_support_is_enough_and_all_of_it_is_needed(how: Filter) -> None:
    for _ in range(60):
        rows, columns, height, width = some_sizes(how)
        image, window = noise(rows, columns), some_window(height, width)
        box = resize_support(rows, columns, height, width, how, window)
        part = image[box.top : box.top + box.height, box.left : box.left + box.width].copy()
        made = resize(part, height, width, how, window, part=(box, (rows, columns)))
        assert np.array_equal(made, resize(image, height, width, how, window)), (rows, columns, height, width, window)
        with pytest.raises(ValueError, match="resized to"):
            resize(
                part[1:],
                height,
                width,
                how,
                window,
                part=(Box(box[0] + 1, box[1], box[2] - 1, box[3]), (rows, columns)),
            )


def test_a_row_apart_changes_nothing_beyond_the_window() -> None:
    out = np.full((6, 5, 3), 7, np.uint8)
    resize(noise(50, 60), 20, 20, "bicubic", Box(15, 3, 4, 5), out=out[1:5])
    assert (out[[0, 5]] == 7).all()


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(0, 5, None), (5, 70000, None), (5, 5, Box(-1, 0, 2, 2)), (5, 5, Box(0, 4, 2, 2)), (5, 5, Box(0, 0, 0, 2))],
)
def test_what_makes_no_sense_is_refused(height: int, width: int, window: Box | None) -> None:
    with pytest.raises(ValueError, match=r"resized to|out of shape"):
        resize(noise(9, 9), height, width, "bilinear", window)
    with pytest.raises(ValueError, match="resized to"):
        resize_support(9, 9, height, width, "area", window or Box(0, 0, height, width))


def test_pixels_of_another_kind_are_refused() -> None:
    for wrong in (np.zeros((4, 4, 3), np.int8), np.zeros((4, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8).T):
        with pytest.raises(ValueError, match="expected uint8"):
            resize(wrong, 2, 2, "bilinear")


@pytest.mark.slow
@pytest.mark.parametrize("march", ["native", "haswell", "x86-64-v2", "x86-64"])
def test_sanitizers_find_nothing(march: str, tmp_path: Path) -> None:
    files = [path for path in SOURCES.files if path.stem in PARTS]
    harness = ROOT / "tests" / "support" / "native" / "random_pixels.cpp"
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    command = [*compiler(), "-std=c++17", f"-march={march}", *flags, f"-I{FOLDER}", *files, harness]
    subprocess.run([*command, "-o", tmp_path / "harness"], check=True)
    subprocess.run([tmp_path / "harness", "3000"], check=True)


def test_the_installed_libraries_agree() -> None:
    assert pixels.resizes_as_pillow()
    assert pixels.resizes_as_opencv()


def test_another_order_of_passes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_first(image: np.ndarray, height: int, width: int, how: Filter) -> np.ndarray:  # as Pillow 12 does
        return reference(reference(image, len(image), width, how), height, width, how)

    monkeypatch.setattr(pixels, "_resized_by_pillow", rows_first)
    assert not pixels.resizes_as_pillow.__wrapped__()
