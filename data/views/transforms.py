"""From an image's pixels to the uint8 square that the model sees, on the CPU: crop, resize and timm's augmentation."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch.nn import functional as F
from torchvision.transforms import Compose

from convneur.data.config import DataConfig, Interpolation

cv2.setNumThreads(0)  # workers are processes, and OpenCV's threads don't outlive a fork

Transform = Callable[[np.ndarray | Image.Image], torch.Tensor]
"""RGB image, (height, width, 3) uint8 or Pillow's, to (3, H, W) uint8 in channels_last memory format."""

Resize = Callable[[np.ndarray, int, int], torch.Tensor]
"""Part of an RGB image, (h, w, 3) uint8, and the height H and width W it shall have, to (H, W, 3) uint8."""


class View(NamedTuple):
    """What is shown of an image: a part of it, in pixels, flipped as `flips` says: left to right, top to bottom."""

    top: int
    left: int
    height: int
    width: int
    flips: tuple[bool, bool]


LONGEST = 64
"""How many times its shorter side evaluation sees of an image's longer side; its centre crop shows far less."""

FLIP_CODES = {(True, False): 1, (False, True): 0, (True, True): -1}
"""OpenCV's names for `View.flips`."""


class TrainTransform:
    """The random changes of `config.augment`, drawn from the global generators that `seed_libraries` seeds.

    What is drawn is what timm's `create_transform` draws, whatever the interpolation. Erasing and mixing come later,
    on the device.

    Attributes:
        draws_all: whether `draw` draws all there is; else `show` goes on drawing, and has to follow at once.
    """

    def __init__(self, config: DataConfig):
        self._augment, self._size, self._resize = config.augment, config.image_size, RESIZES[config.interpolation]
        _, self._secondary, self._to_tensor = create_transform(
            config.image_size,
            is_training=True,
            color_jitter=config.augment.color_jitter or None,  # type: ignore[arg-type]  # None leaves it out
            auto_augment=config.augment.randaugment or None,
            interpolation="bicubic" if "bicubic" in config.interpolation else "bilinear",  # for RandAugment's rotations
            mean=config.mean,
            use_prefetcher=True,
            separate=True,
        )
        mend_posterize(self._secondary)
        self.draws_all = not self._secondary.transforms

    def draw(self, height: int, width: int) -> View:
        """Draws what is shown of an image of `height` x `width` pixels, of which there is at least one."""
        augment, image = self._augment, torch.empty(3, height, width, device="meta")
        top, left, h, w = RandomResizedCropAndInterpolation.get_params(image, augment.scale, augment.ratio)
        h, w = max(h, 1), max(w, 1)  # of a side of one or two pixels timm may draw none, beyond the edge
        top, left = min(top, height - h), min(left, width - w)
        hflip, vflip = (bool(chance and torch.rand(1) < chance) for chance in (augment.hflip, augment.vflip))
        return View(top, left, h, w, (hflip, vflip))

    def show(self, pixels: np.ndarray, view: View, seen: torch.Tensor) -> None:
        """Makes of an image, (height, width, 3) uint8, what the model sees.

        Args:
            pixels: the image.
            view: what is shown of it.
            seen: takes it, (3, H, W) uint8 in channels_last format.
        """
        top, left, height, width, flips = view
        part = _writable(pixels)[top : top + height, left : left + width]
        resized, target = self._resize(part, self._size, self._size), seen.permute(1, 2, 0)
        if any(flips):
            cv2.flip(resized.numpy(), FLIP_CODES[flips], dst=target.numpy())  # in a third of the time torch's takes
        else:
            target.copy_(resized)
        if not self.draws_all:
            seen.copy_(self._to_tensor(self._secondary(Image.fromarray(target.numpy()))))

    def __call__(self, image: np.ndarray | Image.Image) -> torch.Tensor:
        """Draws, and shows."""
        pixels = _writable(image)
        seen = torch.empty(self._size, self._size, 3, dtype=torch.uint8).permute(2, 0, 1)
        self.show(pixels, self.draw(*pixels.shape[:2]), seen)
        return seen


def eval_transform(config: DataConfig) -> Transform:
    """Resizes the shorter side to image_size / eval_crop, then cuts out the centre, as timm and torchvision do."""
    size, resize = config.image_size, RESIZES[config.interpolation]
    shorter = math.floor(size / config.eval_crop)

    def transform(image: np.ndarray | Image.Image) -> torch.Tensor:
        pixels = _middle(_writable(image))
        sides = pixels.shape[:2]
        resized = resize(
            pixels, *(shorter if side == min(sides) else int(shorter * side / min(sides)) for side in sides)
        )
        top, left = (round((side - size) / 2) for side in resized.shape[:2])
        return resized[top : top + size, left : left + size].permute(2, 0, 1)

    return transform


def _middle(pixels: np.ndarray) -> np.ndarray:
    """The middle of an image with sides as `LONGEST` to 1 or beyond; resized as a whole it may take gigabytes."""
    height, width = pixels.shape[:2]
    limit = LONGEST * min(height, width)
    top, left = (max(side - limit, 0) // 2 for side in (height, width))
    return pixels[top : height - top, left : width - left]


def _writable(image: np.ndarray | Image.Image) -> np.ndarray:
    """The pixels as torch takes them; copied only where they can't be written to."""
    return np.require(image, requirements="W")


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


def mend_posterize(transform: Compose) -> None:
    """Lets timm's RandAugment work with Pillow 13, which refuses what it asks for at full strength: `_posterize`."""
    for part in transform.transforms:
        if isinstance(part, RandAugment):
            for operation in part.ops:
                if operation.aug_fn is posterize:
                    operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """At full strength timm keeps 0 bits: black, which Pillow 13 refuses to make where older versions did."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)
