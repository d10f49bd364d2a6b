"""From encoded bytes to uint8 pixels, on the CPU, through timm's transforms."""

import io
from collections.abc import Callable
from typing import cast

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.auto_augment import RandAugment, posterize
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from convneur.data.config import DataConfig

Transform = Callable[[Image.Image], torch.Tensor]
"""RGB image to (3, H, W) uint8."""


def decode(image: bytes) -> Image.Image:
    """Decode an image file to RGB, to the pixels that Pillow makes of it and torchvision's reader thus shows.

    Orientation in EXIF is left as it is. Intact JPEGs go through simplejpeg, which is faster and gives the same bits.

    Raises:
        ValueError: it is no image, or a damaged one; says why in one line.
    """
    pixels = _decode_plain_jpeg(image)
    if pixels is not None:
        height, width, _ = pixels.shape
        # Pillow keeps four bytes a pixel, so this is a plain copy.
        return Image.frombytes("RGB", (width, height), pixels.data, "raw", "RGBX")
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("no known image format") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise anything, from OSError to struct.error
        raise ValueError(" ".join(str(error).split()) or repr(error)) from None


def _decode_plain_jpeg(image: bytes) -> np.ndarray | None:
    """(H, W, 4) uint8, the fourth unused.

    None for whatever Pillow is to judge: other formats and colours, damage, gigantic sizes.
    """
    if not image.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
        if colorspace not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(image, "RGBX")
        return pixels
    except ValueError:
        return None


def train_transform(config: DataConfig) -> Transform:
    """The random changes of `config.augment`, drawn from the global generators that `seed_libraries` seeds.

    Erasing and mixing come later, on the device.
    """
    augment = config.augment
    transform: Compose = create_transform(
        config.image_size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # None leaves it out
        auto_augment=augment.randaugment or None,
        interpolation=config.interpolation,
        mean=config.mean,
        use_prefetcher=True,
    )
    mend_posterize(transform)
    return cast(Transform, transform)


def eval_transform(config: DataConfig) -> Transform:
    """Resize the shorter side to image_size / eval_crop, then cut out the centre."""
    transform: Transform = create_transform(
        config.image_size,
        interpolation=config.interpolation,
        crop_pct=config.eval_crop,
        use_prefetcher=True,
    )
    return transform


def mend_posterize(transform: Compose) -> None:
    """Let timm's RandAugment work with Pillow 13, which refuses what it asks for at full strength; see `_posterize`."""
    for part in transform.transforms:
        if isinstance(part, RandAugment):
            for operation in part.ops:
                if operation.aug_fn is posterize:
                    operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """At full strength timm keeps 0 bits: black, which Pillow 13 refuses to make where older versions did."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)
