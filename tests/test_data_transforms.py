"""Decoding and timm's transforms."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.keys import key, libraries_restored, seed_libraries
from convneur.data.transforms import decode, eval_transform, train_transform


@pytest.fixture
def image() -> Image.Image:
    """40 x 60 pixels, all different."""
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpeg"), ("RGB", "webp")]
)
def test_whatever_the_mode_images_become_rgb(image: Image.Image, mode: str, kind: str) -> None:
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind)
    decoded = decode(buffer.getvalue())
    assert (decoded.dtype, decoded.shape) == (np.uint8, (40, 60, 3))


def test_evaluation_sees_the_centre(image: Image.Image) -> None:
    seen = eval_transform(DataConfig(image_size=32, eval_crop=0.8))(image)  # 32 / 0.8 = 40: nothing to resize
    assert seen.dtype == torch.uint8
    assert np.array_equal(seen.permute(1, 2, 0), np.asarray(image)[4:36, 14:46])


def test_evaluation_resizes_the_shorter_side(image: Image.Image) -> None:
    config = DataConfig(image_size=10, eval_crop=0.5, interpolation="bilinear")
    expected = image.resize((30, 20), Image.Resampling.BILINEAR).crop((10, 5, 20, 15))
    assert np.array_equal(eval_transform(config)(image).permute(1, 2, 0), np.asarray(expected))


def test_training_without_randomness_is_a_resize(image: Image.Image) -> None:
    augment = AugmentConfig(scale=(1, 1), ratio=(1.5, 1.5), hflip=0, randaugment="")
    seen = train_transform(DataConfig(image_size=32, interpolation="bicubic", augment=augment))(image)
    expected = image.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(seen.permute(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(randaugment="", hflip=0),  # the crop draws from `random`
        AugmentConfig(scale=(1, 1), ratio=(1.5, 1.5), randaugment="", hflip=0.5),  # the flip from torch
        AugmentConfig(scale=(1, 1), ratio=(1.5, 1.5), randaugment="", hflip=0, color_jitter=0.4),
        AugmentConfig(scale=(1, 1), ratio=(1.5, 1.5), hflip=0),  # RandAugment from numpy and `random`
    ],
)
def test_every_draw_follows_the_key(image: Image.Image, augment: AugmentConfig) -> None:
    transform = train_transform(DataConfig(image_size=16, augment=augment))

    def views() -> list[torch.Tensor]:
        seen = []
        with libraries_restored():
            for number in range(30):
                seed_libraries(key(0, number))
                seen.append(transform(image))
        return seen

    first, second = views(), views()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert any(not torch.equal(view, first[0]) for view in first)


@pytest.mark.parametrize("randaugment", ["rand-m10-n4-p1-inc1", "rand-m0-n4-p1", "rand-m10-mstd5-n4-p1"])
def test_randaugment_works_at_its_extremes(image: Image.Image, randaugment: str) -> None:
    transform = train_transform(replace(DataConfig(image_size=16), augment=AugmentConfig(randaugment=randaugment)))
    with libraries_restored():
        for number in range(300):
            seed_libraries(key(1, number))
            assert transform(image).shape == (3, 16, 16)
