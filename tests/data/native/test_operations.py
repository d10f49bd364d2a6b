"""The augmentation in C++ gives the bits of timm's functions with Pillow."""

import random
from collections.abc import Callable
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import auto_augment as timm
from torchvision.transforms import functional as torchvision

from convneur.data.native import operations
from convneur.data.native.operations import encode_operation, operate

BOTH = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def extremes(most: float, *others: float) -> list[Callable[[], float]]:
    """Draws of an argument: up to RandAugment's strongest, and some far beyond."""
    return [lambda: random.uniform(-most, most), *[lambda other=other: other for other in (most, -most, 0.0, *others)]]


ENHANCED = [lambda: random.uniform(0.1, 1.9), lambda: random.uniform(-3, 5), lambda: 0.0, lambda: 1.0, lambda: 1.9]
DRAWS: dict[Callable, list[Callable[[], float]]] = {
    timm.rotate: extremes(30.0, 90.0, 180.0, 270.0, -90.0, 45.0, 360.0, 359.9, 1e-9, 719.0),
    timm.shear_x: extremes(0.3, 1.0, -4.0),
    timm.shear_y: extremes(0.3, 1.0, -4.0),
    timm.translate_x_abs: extremes(250.0, 3.0, -1.5, 1e5),
    timm.translate_y_abs: extremes(250.0, 3.0, -1.5, 1e5),
    timm.translate_x_rel: extremes(0.45, 1.0),
    timm.translate_y_rel: extremes(0.45, 1.0),
    timm.posterize: [lambda: random.randint(1, 8), lambda: 9],
    timm.solarize: [lambda: random.randint(0, 256), lambda: 0, lambda: 256],
    timm.solarize_add: [lambda: random.randint(0, 128), lambda: 0, lambda: 128, lambda: 255],
    timm.desaturate: [lambda: random.uniform(0.5, 1.0), lambda: 1.0, lambda: 0.0],
    timm.gaussian_blur: [lambda: random.uniform(0.1, 2.0), lambda: 0.0, lambda: 0.1, lambda: 2.0, lambda: 20.0],
    **dict.fromkeys((timm.color, timm.contrast, timm.brightness, timm.sharpness), ENHANCED),
}
NAMES = [*DRAWS, *operations.PLAIN]


@pytest.fixture(autouse=True)
def drawn() -> None:
    random.seed(0)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Photographs, noise, few values, one value; of one pixel, and of sides of one, two and three."""
    numbers, photo = np.random.default_rng(0), load_sample_image("china.jpg")
    shapes = [(1, 1), (1, 9), (7, 1), (2, 2), (3, 3), (2, 5), (31, 30), (96, 97)]
    noise = [numbers.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    few = [(image // 100 * 127).astype(np.uint8) for image in noise[-2:]]
    constant = [np.full((5, 6, 3), (0, 255, 77), np.uint8), np.full((64, 3, 3), 255, np.uint8)]
    dark = [photo[:64, :80] // 3 + 20]
    return [*noise, *few, *constant, *dark, photo[150:374, 200:424].copy()]


def check(image: np.ndarray, function: Callable, args: tuple[float, ...], **kwargs: Any) -> None:
    expected = np.array(function(Image.fromarray(image), *args, **kwargs))
    operation, made = encode_operation(function, args, kwargs), image.copy()
    assert operation
    assert operate(made, [operation])
    assert np.array_equal(made, expected), (function.__name__, args, kwargs, image.shape)


@pytest.mark.usefixtures("each_build")
@pytest.mark.parametrize("function", NAMES, ids=lambda function: function.__name__)
def test_each_operation_is_timms(function: Callable, images: list[np.ndarray]) -> None:
    for image, draw in product(images[:-1], DRAWS.get(function, [None])):
        fill = tuple(random.randint(0, 255) for _ in range(3))
        for resample in BOTH if function is timm.rotate or function in operations.SHIFTS else BOTH[1:]:
            check(image, function, (draw(),) if draw else (), resample=resample, fillcolor=fill)


@pytest.mark.parametrize("function", NAMES, ids=lambda function: function.__name__)
def test_each_operation_on_a_photograph_is_timms(function: Callable, images: list[np.ndarray]) -> None:
    draws = DRAWS.get(function, [None])
    for resample, draw in zip(BOTH, (*draws, *draws), strict=False):
        check(images[-1], function, (draw(),) if draw else (), resample=resample, fillcolor=(124, 116, 104))


@pytest.mark.parametrize(
    "policy", ["rand-m9-n4-mstd0.5-inc1", "rand-m10-n4-p1", "rand-m4-n4-mstd5", "v0", "originalr", "3a"]
)
def test_whole_policies_are_timms(policy: str, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = {"img_mean": (124, 116, 104), "translate_const": 43, "interpolation": Image.Resampling.BILINEAR}
    make = timm.rand_augment_transform if policy.startswith("rand") else timm.auto_augment_transform
    augment, calls = make(policy, hparams), []

    def recorded(function: Callable) -> Callable:
        def call(image: Image.Image, *args: float, **kwargs: Any) -> Image.Image:
            if function is timm.gaussian_blur_rand:
                return image
            calls.append(encode_operation(function, args, kwargs))
            return (
                Image.new("RGB", image.size)
                if args == (0,) and function is timm.posterize
                else function(image, *args, **kwargs)
            )

        return call

    for operation in getattr(augment, "ops", None) or chain.from_iterable(augment.policy):
        operation.aug_fn = recorded(operation.aug_fn)
    for _ in range(30):
        calls.clear()
        image = images[-2]
        expected, made = np.array(augment(Image.fromarray(image))), image.copy()
        assert operate(made, calls)
        assert np.array_equal(made, expected), calls


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_jitter_is_torchvisions(name: str, images: list[np.ndarray]) -> None:
    for factor in (0.6, 1.4, 0.0, 1.0):
        check(images[-1], getattr(torchvision, f"adjust_{name}"), (factor,))


def test_no_bits_make_black(images: list[np.ndarray]) -> None:
    operation, made = encode_operation(timm.posterize, (0,), {}), images[-1].copy()
    assert operation
    assert operate(made, [operation])
    assert not made.any()


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (timm.rotate, (3.0,), {"resample": Image.Resampling.NEAREST}),
        (timm.rotate, (3.0,), {"resample": BOTH}),
        (timm.shear_x, (0.1,), {"fillcolor": (0, 0, 300)}),
        (timm.shear_x, (0.1,), {"fillcolor": "red"}),
        (timm.shear_x, (float("nan"),), {}),
        (timm.posterize, (-1,), {}),
        (timm.solarize_add, (-5,), {}),
        (timm.gaussian_blur_rand, (0.5,), {}),
        (torchvision.adjust_hue, (0.1,), {}),
    ],
)
def test_what_is_not_known_is_left_to_pillow(
    function: Callable, args: tuple[float, ...], kwargs: dict[str, Any]
) -> None:
    assert encode_operation(function, args, kwargs) is None


def test_an_unknown_operation_among_others_changes_nothing(images: list[np.ndarray]) -> None:
    made, inversion = images[-1].copy(), encode_operation(timm.invert, (), {})
    assert inversion
    for wrong in [(18.0, *[0.0] * 7), (1.5, *[0.0] * 7), (1.0, 1e9, 2.0, *[0.0] * 5), (10.0, 9.0, *[0.0] * 6)]:
        assert not operate(made, [inversion, wrong])
    assert np.array_equal(made, images[-1])


def test_images_of_another_kind_are_refused() -> None:
    for wrong in (np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.int8), np.zeros((4, 8, 3), np.uint8)[:, ::2]):
        with pytest.raises(ValueError, match="expected contiguous uint8"):
            operate(wrong, [])


def test_the_installed_libraries_agree() -> None:
    assert operations.augments_as_timm()


def test_another_arithmetic_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    confused = {**operations.FACTORS, timm.color: operations.FACTORS[timm.contrast]}
    monkeypatch.setattr(operations, "FACTORS", confused)
    assert not operations.augments_as_timm.__wrapped__()
