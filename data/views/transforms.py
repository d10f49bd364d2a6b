"""From an image to the square that the model sees, on the CPU: cropped, resized, flipped and changed."""

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from convneur.data.config import DataConfig, Interpolation
from convneur.data.views.decode import decode, plain_jpeg_size
from convneur.data.views.draws import Draws
from convneur.data.views.view import View, central_view

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

    def show(self, image: bytes, seen: torch.Tensor, view: View | None = None) -> None:
        """Shows an image file.

        Args:
            image: the file.
            seen: takes what the model sees, (3, H, W) uint8 in channels_last memory format.
            view: what is shown of it; None to choose that now.

        Raises:
            ValueError, MemoryError: what `decode` raises.
        """
        if view is None and (size := plain_jpeg_size(image)):
            view = self.choose(*size)
        self.show_pixels(decode(image), seen, view)

    def show_pixels(self, pixels: np.ndarray, seen: torch.Tensor, view: View | None = None) -> None:
        """Shows an image that is decoded already, (height, width, 3) uint8; see `show`."""
        view = view or self.choose(*pixels.shape[:2])
        target = seen.permute(1, 2, 0)
        part = np.require(pixels, requirements="W")  # as torch takes them; copied only where they can't be written to
        part = part[view.top : view.top + view.height, view.left : view.left + view.width]
        top, left = view.window
        resized = self._resize(part, *view.resized)[top : top + self._size, left : left + self._size]
        if any(view.flips):
            cv2.flip(resized.numpy(), FLIP_CODES[view.flips], dst=target.numpy())
        else:
            target.copy_(resized)
        if view.operations:
            image = Image.fromarray(target.numpy())
            for operation in view.operations:
                image = operation(image)
            target.copy_(torch.from_numpy(np.array(image)))

    def __call__(self, image: np.ndarray | Image.Image) -> torch.Tensor:
        """Shows an RGB image, (height, width, 3) uint8 or Pillow's; returns (3, H, W) uint8, channels_last."""
        seen = torch.empty(self._size, self._size, 3, dtype=torch.uint8).permute(2, 0, 1)
        self.show_pixels(np.asarray(image), seen)
        return seen


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
