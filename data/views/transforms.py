"""From an image to the square that the model sees, on the CPU: cropped, resized, flipped and changed."""

from collections.abc import Callable
from functools import cache, partial

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from convneur.data.config import DataConfig, Interpolation
from convneur.data.native.operations import Operation as Code
from convneur.data.native.operations import augments_as_timm
from convneur.data.native.pixels import FILTERS, Filter
from convneur.data.native.view import can_show, show_jpeg, show_pixels
from convneur.data.views.decode import decode, plain_jpeg_size
from convneur.data.views.draws import Draws
from convneur.data.views.view import Operation, View, central_view

cv2.setNumThreads(0)  # workers are processes, and OpenCV's threads don't outlive a fork

Resize = Callable[[np.ndarray, int, int], torch.Tensor]
"""Part of an RGB image, (h, w, 3) uint8, and the height H and width W it shall have, to (H, W, 3) uint8."""

FLIP_CODES = {(True, False): 1, (False, True): 0, (True, True): -1}
"""OpenCV's names for `View.flips`."""


class Transform:
    """Makes of images what the model sees, by the libraries whose pixels it is to have, or natively the same.

    Args:
        config: has image_size and interpolation.
        choose: height and width of an image to what is shown of it.
    """

    def __init__(self, config: DataConfig, choose: Callable[[int, int], View]):
        self._size, self._resize, self.choose = config.image_size, RESIZES[config.interpolation], choose
        self._filter = native_filter(config.interpolation)
        self._augments = self._filter is not None and augments_as_timm()

    @property
    def is_native(self) -> bool:
        """Whether it is done in C++, where the file allows."""
        return self._filter is not None

    def show(self, image: bytes, seen: torch.Tensor, view: View | None = None, proven: bool = False) -> None:
        """Shows an image file.

        Args:
            image: the file.
            seen: takes what the model sees, (3, H, W) uint8 in channels_last memory format.
            view: what is shown of it; None to choose that now.
            proven: whether the file was decoded whole before, and its checksum is right.

        Raises:
            ValueError, MemoryError: what `decode` raises.
        """
        if view is None and (size := plain_jpeg_size(image)):
            view = self.choose(*size)
        if view and self._filter:
            target, (codes, others) = seen.permute(1, 2, 0), self._split(view)
            if show_jpeg(image, proven, _numbers(view), self._filter, self._size, codes, target.data_ptr()):
                _change(target, others)
                return
        self.show_pixels(decode(image), seen, view)

    def show_pixels(self, pixels: np.ndarray, seen: torch.Tensor, view: View | None = None) -> None:
        """Shows an image that is decoded already, (height, width, 3) uint8; see `show`."""
        view = view or self.choose(*pixels.shape[:2])
        target, (codes, others) = seen.permute(1, 2, 0), self._split(view)
        address = target.data_ptr()
        if not self._filter or not show_pixels(pixels, _numbers(view), self._filter, self._size, codes, address):
            self._resize_by_library(pixels, view, target)
            others = view.operations
        _change(target, others)

    def _split(self, view: View) -> tuple[list[Code], tuple[Operation, ...]]:
        """Those of a view's operations that are made in C++, in numbers, and those that Pillow makes."""
        codes = [operation.code for operation in view.operations if operation.code] if self._augments else []
        if len(codes) < len(view.operations):  # their order counts
            return [], view.operations
        return codes, ()

    def _resize_by_library(self, pixels: np.ndarray, view: View, target: torch.Tensor) -> None:
        part = np.require(pixels, requirements="W")  # as torch takes them; copied only where they can't be written to
        part = part[view.top : view.top + view.height, view.left : view.left + view.width]
        top, left = view.window
        resized = self._resize(part, *view.resized)[top : top + self._size, left : left + self._size]
        if any(view.flips):
            cv2.flip(resized.numpy(), FLIP_CODES[view.flips], dst=target.numpy())
        else:
            target.copy_(resized)

    def __call__(self, image: np.ndarray | Image.Image) -> torch.Tensor:
        """Shows an RGB image, (height, width, 3) uint8 or Pillow's; returns (3, H, W) uint8, channels_last."""
        seen = torch.empty(self._size, self._size, 3, dtype=torch.uint8).permute(2, 0, 1)
        self.show_pixels(np.asarray(image), seen)
        return seen


def _change(target: torch.Tensor, operations: tuple[Operation, ...]) -> None:
    if operations:
        image = Image.fromarray(target.numpy())
        for operation in operations:
            image = operation(image)
        target.copy_(torch.from_numpy(np.array(image)))


def _numbers(view: View) -> tuple[int, ...]:
    return (*view[:4], *view.resized, *view.window, *view.flips)


@cache
def native_filter(interpolation: Interpolation) -> Filter | None:
    """The filter by which C++ resizes to the same bits; None where it doesn't."""
    return interpolation if interpolation in FILTERS and can_show(interpolation) else None


class TrainTransform(Transform):
    """Shows what is drawn at random: see `Draws`."""

    def __init__(self, config: DataConfig):
        super().__init__(config, Draws(config).draw)


class EvalTransform(Transform):
    """Shows the centre: see `central_view`."""

    def __init__(self, config: DataConfig):
        super().__init__(config, partial(central_view, config))


def _resize_pillow(pixels: np.ndarray, height: int, width: int, *, resample: Image.Resampling) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.fromarray(pixels).resize((width, height), resample)))


def _resize_torch(pixels: np.ndarray, height: int, width: int, *, mode: str) -> torch.Tensor:
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return F.interpolate(images, (height, width), mode=mode, antialias=True)[0].permute(1, 2, 0)


def _resize_opencv(pixels: np.ndarray, height: int, width: int, *, interpolation: int) -> torch.Tensor:
    return torch.from_numpy(cv2.resize(pixels, (width, height), interpolation=interpolation))


RESIZES: dict[Interpolation, Resize] = {
    "bilinear": partial(_resize_pillow, resample=Image.Resampling.BILINEAR),
    "bicubic": partial(_resize_pillow, resample=Image.Resampling.BICUBIC),
    "fast-bilinear": partial(_resize_torch, mode="bilinear"),
    "fast-bicubic": partial(_resize_torch, mode="bicubic"),
    "area": partial(_resize_opencv, interpolation=cv2.INTER_AREA),
    "linear": partial(_resize_opencv, interpolation=cv2.INTER_LINEAR),
}
"""All compute in integers, or were seen to give the same bits with and without AVX2; OpenCV's cubic one doesn't."""
