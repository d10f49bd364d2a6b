"""Decoding and timm's transforms."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from convneur.data.config import AugmentConfig, DataConfig, Interpolation
from convneur.data.keys import key, libraries_restored, seed_libraries
from convneur.data.prepare.synthetic import SyntheticImages
from convneur.data.views.decode import decode
from convneur.data.views.draws import mend_posterize
from convneur.data.views.transforms import RESIZES, EvalTransform, TrainTransform


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
    seen = EvalTransform(DataConfig(image_size=32, eval_crop=0.8))(image)  # 32 / 0.8 = 40: nothing to resize
    assert seen.dtype == torch.uint8
    assert np.array_equal(seen.permute(1, 2, 0), np.asarray(image)[4:36, 14:46])


def test_evaluation_resizes_the_shorter_side(image: Image.Image) -> None:
    config = DataConfig(image_size=10, eval_crop=0.5, interpolation="bilinear")
    expected = image.resize((30, 20), Image.Resampling.BILINEAR).crop((10, 5, 20, 15))
    assert np.array_equal(EvalTransform(config)(image).permute(1, 2, 0), np.asarray(expected))


def test_training_without_randomness_is_a_resize(image: Image.Image) -> None:
    augment = AugmentConfig(scale=(1, 1), ratio=(1.5, 1.5), hflip=0, randaugment="")
    seen = TrainTransform(DataConfig(image_size=32, interpolation="bicubic", augment=augment))(image)
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
    transform = TrainTransform(DataConfig(image_size=16, augment=augment))

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
    transform = TrainTransform(replace(DataConfig(image_size=16), augment=AugmentConfig(randaugment=randaugment)))
    with libraries_restored():
        for number in range(300):
            seed_libraries(key(1, number))
            assert transform(image).shape == (3, 16, 16)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("randaugment", ["", "rand-m9-mstd0.5-inc1"])
def test_pillows_interpolations_are_timms_transforms_to_the_bit(
    image: Image.Image, interpolation: str, randaugment: str
) -> None:
    augment = AugmentConfig(randaugment=randaugment, color_jitter=0.4, vflip=0.3)
    config = DataConfig(image_size=32, interpolation=interpolation, augment=augment)
    options = {"interpolation": interpolation, "use_prefetcher": True}
    training = create_transform(
        32, is_training=True, vflip=0.3, color_jitter=0.4, auto_augment=randaugment or None, **options
    )
    mend_posterize(training)
    evaluation = create_transform(32, crop_pct=config.eval_crop, **options)
    for ours, theirs in ((TrainTransform(config), training), (EvalTransform(config), evaluation)):
        for number in range(10):
            views = []
            for transform in (ours, theirs):
                with libraries_restored():
                    seed_libraries(key(0, number))
                    views.append(torch.as_tensor(transform(image)))
            assert torch.equal(*views)


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 97), (20, 20), (300, 210)])
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
def test_evaluation_is_timms_for_any_size(size: tuple[int, int], crop: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8))
    theirs = create_transform(32, interpolation="bilinear", crop_pct=crop, use_prefetcher=True)
    ours = EvalTransform(DataConfig(image_size=32, interpolation="bilinear", eval_crop=crop))
    assert torch.equal(ours(image), torch.as_tensor(theirs(image)))


LIKE_A_PHOTO = SyntheticImages("x", 8, 1, 75, 100)


def encoded(number: int, kind: str) -> bytes:
    """An image file of some kind; "damaged": a JPEG whose data end too early, which Pillow refuses."""
    if kind == "damaged":
        return LIKE_A_PHOTO[number].image[:-900]
    picture, buffer = Image.open(io.BytesIO(LIKE_A_PHOTO[number].image)), io.BytesIO()
    options: dict[str, dict[str, Any]] = {
        "444": {"subsampling": 0},
        "422": {"subsampling": 1},
        "progressive": {"progressive": True},
        "restart": {"restart_marker_blocks": 3, "optimize": True},
    }
    mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    picture.convert(mode).save(buffer, "png" if kind == "png" else "jpeg", **options.get(kind, {}))
    return buffer.getvalue()


KINDS = ["420", "444", "422", "grey", "restart", "progressive", "cmyk", "png", "damaged"]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "area"])
@pytest.mark.parametrize("transform", [TrainTransform, EvalTransform])
def test_the_native_path_shows_the_libraries_pixels(
    transform: type[TrainTransform | EvalTransform], interpolation: Interpolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(
        image_size=48, interpolation=interpolation, augment=AugmentConfig(vflip=0.5, randaugment="rand-m9-n3-p1-inc1")
    )
    native = transform(config)
    assert native.is_native
    with monkeypatch.context() as without:
        without.setattr("convneur.data.views.transforms.native_filter", lambda _: None)
        libraries = transform(config)
    for kind in KINDS:
        for number in range(8):
            image, views = encoded(number, kind), []
            for one in (native, libraries):
                seen = torch.zeros(48, 48, 3, dtype=torch.uint8).permute(2, 0, 1)
                with libraries_restored():
                    seed_libraries(key(0, number))
                    try:
                        one.show(image, seen)
                    except ValueError as error:
                        seen = str(error)
                views.append(seen)
            if kind == "damaged":
                assert isinstance(views[0], str)
                assert views[0] == views[1]
            else:
                assert torch.equal(*views), (kind, number)


@pytest.fixture
def photo() -> np.ndarray:
    """200 x 300 pixels that change as slowly as those of a photograph."""
    grid = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(grid).resize((300, 200), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("side", [64, 224])
def test_the_fast_interpolations_are_pillows_but_for_rounding(photo: np.ndarray, side: int) -> None:
    for kind, most in (("bilinear", 1), ("bicubic", 2)):
        ours, pillows = (RESIZES[name](photo.copy(), side, side).int() for name in (f"fast-{kind}", kind))
        assert (ours - pillows).abs().max() <= most
        assert (ours != pillows).float().mean() < 0.1


def test_area_is_the_mean_and_only_linear_aliases() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200  # as fine as can be: 16 columns can't show them
    seen = {name: resize(stripes, 16, 16).float() for name, resize in RESIZES.items()}
    for name, pixels in seen.items():
        assert pixels.shape == (16, 16, 3)
        middle = pixels[2:-2, 2:-2]
        assert (middle - 100).abs().max() <= (1 if name != "linear" else 100)
    dots = np.zeros((64, 64, 3), np.uint8)
    dots[::4, ::4] = 160
    assert torch.equal(RESIZES["area"](dots, 16, 16), torch.full((16, 16, 3), 10, dtype=torch.uint8))
    assert RESIZES["linear"](dots, 16, 16).max() == 0  # missed altogether


@pytest.mark.parametrize("name", list(RESIZES))
def test_resizing_never_changes(photo: np.ndarray, name: str) -> None:
    """Not with threads either, nor with the memory that the part lies in."""
    part = photo.copy()[11:171, 23:213]
    expected = RESIZES[name](np.ascontiguousarray(part), 96, 96)
    assert torch.equal(RESIZES[name](part, 96, 96), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(RESIZES[name](part, 96, 96), expected)
    finally:
        torch.set_num_threads(threads)


_WITHOUT_AVX = """
import hashlib, sys
import numpy as np
from convneur.data.views.transforms import RESIZES
part = np.load(sys.argv[1])[11:171, 23:213]
for name, resize in RESIZES.items():
    for side in (96, 224):
        print(name, side, hashlib.sha256(resize(part, side, side).contiguous().numpy().tobytes()).hexdigest())
"""


def test_processors_without_avx_give_the_same_bits(photo: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "photo.npy", photo)
    settings = {"ATEN_CPU_CAPABILITY": "default", "OPENCV_CPU_DISABLE": "AVX2,AVX512_SKX,FP16,AVX"}
    command = [sys.executable, "-c", _WITHOUT_AVX, tmp_path / "photo.npy"]
    results = [
        subprocess.run(command, env=os.environ | changes, capture_output=True, check=True, text=True).stdout
        for changes in ({}, settings)
    ]
    assert results[0] == results[1]
    assert results[0].count("\n") == 2 * len(RESIZES)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("interpolation", RESIZES)
def test_an_image_of_any_size_is_shown(size: tuple[int, int], interpolation: str) -> None:
    """A crop has at least a pixel and lies within the image: a grey image stays grey, of the size asked for."""
    config = DataConfig(image_size=16, interpolation=interpolation, augment=AugmentConfig(randaugment=""))
    pixels = np.full((*size, 3), 77, np.uint8)
    for ratio in ((3 / 4, 4 / 3), (1 / 9, 1 / 7), (7.0, 9.0)):
        transform = TrainTransform(replace(config, augment=replace(config.augment, ratio=ratio)))
        for _ in range(20):
            top, left, height, width, *_ = transform.choose(*size)
            assert 0 <= top < top + height <= size[0]
            assert 0 <= left < left + width <= size[1]
        assert transform(pixels).unique().tolist() == [77]
    shown = EvalTransform(config)(pixels)
    assert (shown.shape, shown.unique().tolist()) == ((3, 16, 16), [77])


def test_evaluation_shows_the_middle_of_a_very_long_image() -> None:
    """As of one that is not as long."""
    middle = np.random.default_rng(0).integers(0, 256, (10, 300, 3), dtype=np.uint8)
    transform = EvalTransform(DataConfig(image_size=16))
    longer = np.concatenate([np.zeros((10, 600, 3), np.uint8), middle, np.zeros((10, 600, 3), np.uint8)], axis=1)
    assert (transform(longer).int() - transform(middle).int()).abs().max() <= 1
