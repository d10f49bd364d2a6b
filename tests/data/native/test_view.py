"""Views in one call: what they refuse, and that they write where they should."""

import numpy as np
import pytest
import simplejpeg

from convneur.data.native.view import show_jpeg, show_pixels

SIZE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
JPEG = simplejpeg.encode_jpeg(PIXELS)
VIEW = [2, 3, 15, 25, 8, 8, 0, 0, 1, 0]  # top, left, height, width, resized, window, flips


@pytest.fixture
def room() -> np.ndarray:
    """A square's room, between as much before and behind it."""
    return np.full((3, SIZE, SIZE, 3), 77, np.uint8)


def test_writes_the_square_and_nothing_else(room: np.ndarray) -> None:
    assert show_jpeg(JPEG, False, VIEW, "bicubic", SIZE, (), room[1].ctypes.data)
    assert (room[[0, 2]] == 77).all()
    other = np.empty((SIZE, SIZE, 3), np.uint8)
    assert show_pixels(simplejpeg.decode_jpeg(JPEG), VIEW, "bicubic", SIZE, (), other.ctypes.data)
    assert np.array_equal(room[1], other)


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, -1), (0, 6), (1, 6), (2, 0), (2, 19), (3, 28), (4, 0), (4, 1 << 30), (6, -1), (6, 1), (7, 1), (2, 1 << 30)],
)
@pytest.mark.parametrize("how", ["bilinear", "area"])
def test_a_view_that_cannot_be_is_not_shown(room: np.ndarray, how: str, place: int, value: int) -> None:
    view = VIEW.copy()
    view[place] = value
    assert not show_jpeg(JPEG, False, view, how, SIZE, (), room[1].ctypes.data)
    assert not show_pixels(PIXELS, view, how, SIZE, (), room[1].ctypes.data)
    assert (room == 77).all()


def test_what_is_no_jpeg_is_not_shown(room: np.ndarray) -> None:
    for image in (b"", b"\xff", JPEG[:100], JPEG[:-30], b"\x89PNG" + JPEG):
        assert not show_jpeg(image, False, VIEW, "bilinear", SIZE, (), room[1].ctypes.data)
    assert (room == 77).all()
