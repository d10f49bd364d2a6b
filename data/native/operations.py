"""timm's augmentation of pixels in C++, to the bits of what its functions make with the Pillow it was made after."""

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment as timm
from torchvision.transforms import functional as torchvision

from convneur.data import native

Operation = tuple[float, ...]
"""What is done, as `operations.h` numbers it, and its arguments: eight numbers."""

Function = Callable[..., Any]

SHIFTS: dict[Function, int] = {
    timm.shear_x: 1,
    timm.shear_y: 2,
    timm.translate_x_abs: 3,
    timm.translate_y_abs: 4,
    timm.translate_x_rel: 5,
    timm.translate_y_rel: 6,
}
PLAIN: dict[Function, int] = {timm.auto_contrast: 7, timm.invert: 8, timm.equalize: 9}
FACTORS: dict[Function, int] = {
    timm.solarize: 11,
    timm.color: 13,
    timm.contrast: 14,
    timm.brightness: 15,
    timm.sharpness: 16,
    timm.gaussian_blur: 17,
    torchvision.adjust_saturation: 13,
    torchvision.adjust_contrast: 14,
    torchvision.adjust_brightness: 15,
}
ROTATE, POSTERIZE, SOLARIZE_ADD, COLOR = 0, 10, 12, 13


def encode_operation(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operation | None:
    """A call of one of timm's functions, or of torchvision's for colour jitter, in numbers.

    Args:
        function: of an image, `args` and `kwargs`. timm's posterize is taken to make black of 0 bits, as it did before
            Pillow 13.
        args: what follows the image.
        kwargs: timm's `fillcolor` and `resample`; not several to draw one from.

    Returns:
        None where it isn't known here: Pillow has to do it.
    """
    code = PLAIN.get(function)
    if code is not None:
        return _padded(code)
    if not args or not all(isinstance(arg, int | float) and math.isfinite(arg) for arg in args):
        return None
    value = float(args[0])
    if function in SHIFTS or function is timm.rotate:
        resampling = _resampling(kwargs)
        return resampling and _moved(function, value, resampling)
    if len(args) == 1 and function in FACTORS:
        return _padded(FACTORS[function], value)
    if len(args) == 1 and function is timm.desaturate:
        return _padded(COLOR, min(1.0, max(0.0, 1.0 - value)))
    if len(args) == 1 and function is timm.posterize and value >= 0 and isinstance(args[0], int):
        return _padded(POSTERIZE, min(value, 8))
    if len(args) <= 2 and function is timm.solarize_add and 0 <= value <= 255 and isinstance(args[0], int):
        return _padded(SOLARIZE_ADD, value, float(args[1]) if len(args) == 2 else 128.0)
    return None


def _padded(*numbers: float) -> Operation:
    return (*map(float, numbers), *[0.0] * (8 - len(numbers)))


def _resampling(kwargs: Mapping[str, Any]) -> Operation | None:
    """The interpolation and the colour of what lies beyond the image."""
    resample = kwargs.get("resample", Image.Resampling.BICUBIC)
    fill = kwargs.get("fillcolor") or (0, 0, 0)
    is_known = isinstance(resample, int) and resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    if not is_known or not isinstance(fill, tuple) or len(fill) != 3:
        return None
    if not all(isinstance(value, int) and 0 <= value <= 255 for value in fill):
        return None
    return (float(resample), *map(float, fill))


def _moved(function: Function, value: float, resampling: Operation) -> Operation:
    if function is not timm.rotate:
        return _padded(SHIFTS[function], value, *resampling)
    angle = value % 360.0
    turn = -math.radians(angle)  # Pillow's way, to the bit
    return _padded(ROTATE, angle, round(math.cos(turn), 15), round(math.sin(turn), 15), *resampling)


def operate(image: np.ndarray, operations: Sequence[Operation]) -> bool:
    """Changes an image, (height, width, 3) uint8, contiguous, by one operation after another.

    Returns:
        Whether all of them are known; else nothing is changed.

    Raises:
        MemoryError: there isn't room for a copy of the image.
        ValueError: the image is of another kind.
    """
    compiled = native.library()
    assert compiled, "needs the compiled library"
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.flags.c_contiguous:
        raise ValueError(
            f"an image of shape {image.shape}, {image.dtype}: expected contiguous uint8, (height, width, 3)"
        )
    numbers = (ctypes.c_double * (8 * len(operations)))(*(number for each in operations for number in each))
    outcome = compiled.convneur_operate(image.ctypes.data, *image.shape[:2], numbers, len(operations))
    if outcome == 2:
        raise MemoryError(f"no room for a copy of an image of {image.shape[0]} x {image.shape[1]} pixels")
    return bool(outcome == 0)


EXAMPLES: list[tuple[Function, tuple[float, ...]]] = [
    *[(timm.rotate, (degrees,)) for degrees in (0.0, 17.3, -30.0, 90.0, 180.0, 270.0)],
    *[(shift, (factor,)) for shift in SHIFTS for factor in (0.27, -3.4)],
    *[(function, ()) for function in PLAIN],
    *[(function, (factor,)) for function in FACTORS for factor in (0.3, 1.7)],
    (timm.posterize, (3,)),
    (timm.solarize, (90,)),
    (timm.solarize_add, (99,)),
    (timm.desaturate, (0.7,)),
]
"""Calls that show whether timm and Pillow make what is made here."""


@cache
def augments_as_timm() -> bool:
    """Whether there is a library, and timm's functions with the installed Pillow change images to its bits."""
    if not native.library():
        return False
    noise = np.random.default_rng(0).integers(0, 256, (19, 19, 3), dtype=np.uint8)
    moved = [example for example in EXAMPLES if example[0] is timm.rotate or example[0] in SHIFTS]
    both = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    return all(_agrees(noise, *example, Image.Resampling.BICUBIC) for example in EXAMPLES) and all(
        _agrees(noise[:12].copy(), *example, resample) for example in moved for resample in both
    )


def _agrees(image: np.ndarray, function: Function, args: tuple[float, ...], resample: Image.Resampling) -> bool:
    kwargs = {} if function.__module__ == torchvision.__name__ else {"resample": resample, "fillcolor": (1, 2, 3)}
    operation, changed = encode_operation(function, args, kwargs), image.copy()
    if operation is None or not operate(changed, [operation]):
        return False
    return np.array_equal(changed, np.array(function(Image.fromarray(image), *args, **kwargs)))
