"""What training shows of an image, drawn as timm draws it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, brightness, color, contrast, posterize
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torchvision.transforms import ColorJitter, Compose

from convneur.data.config import DataConfig
from convneur.data.native.operations import encode_operation
from convneur.data.views.view import Operation, View


class Draws:
    """The random changes of `config.augment`, drawn from the global generators that `seed_libraries` seeds.

    What is drawn is what timm's `create_transform` draws, whatever the interpolation; timm's operations are noted
    instead of made. Erasing and mixing come later, on the device.
    """

    def __init__(self, config: DataConfig):
        self._augment, self._size = config.augment, config.image_size
        _, secondary, _ = create_transform(
            config.image_size,
            is_training=True,
            color_jitter=config.augment.color_jitter or None,  # type: ignore[arg-type]  # None leaves it out
            auto_augment=config.augment.randaugment or None,
            interpolation="bicubic" if "bicubic" in config.interpolation else "bilinear",  # for RandAugment's rotations
            mean=config.mean,
            use_prefetcher=True,
            separate=True,
        )
        self._parts = [_noting(part) for part in secondary.transforms]

    def draw(self, height: int, width: int) -> View:
        """Draws what is shown of an image of `height` x `width` pixels, of which there is at least one."""
        augment, image = self._augment, torch.empty(3, height, width, device="meta")
        top, left, h, w = RandomResizedCropAndInterpolation.get_params(image, augment.scale, augment.ratio)
        h, w = max(h, 1), max(w, 1)  # of a side of one or two pixels timm may draw none, beyond the edge
        top, left = min(top, height - h), min(left, width - w)
        hflip, vflip = (bool(chance and torch.rand(1) < chance) for chance in (augment.hflip, augment.vflip))
        operations: list[Operation] = []
        for part in self._parts:
            part(operations)
        size = (self._size, self._size)
        return View(top, left, h, w, size, flips=(hflip, vflip), operations=tuple(operations))


def _noting(part: Callable[..., Any]) -> Callable[[list[Operation]], Any]:
    """What draws as `part` does, and adds the operations that it would make to a list."""
    if isinstance(part, RandAugment):
        for operation in part.ops:
            operation.aug_fn = _noted(operation.aug_fn)
        return part if part.choice_weights is not None else partial(_choose, part)
    assert isinstance(part, ColorJitter), part  # there is nothing else that `AugmentConfig` asks for

    def jitter(operations: list[Operation]) -> None:
        order, *factors = ColorJitter.get_params(part.brightness, part.contrast, part.saturation, part.hue)
        for number in order.tolist():
            if factors[number] is not None:
                function, args = (brightness, contrast, color)[number], (factors[number],)
                operations.append(Operation(function, args, {}, encode_operation(function, args, {})))

    return jitter


def _choose(part: RandAugment, operations: list[Operation]) -> None:
    """Does as `part` does: `numpy.random.choice` draws by `randint`, and takes 40 microseconds more for it."""
    for number in np.random.randint(0, len(part.ops), part.num_layers):
        part.ops[number](operations)


def _noted(function: Callable[..., Image.Image]) -> Callable[..., list[Operation]]:
    def note(operations: list[Operation], *args: float, **options: Any) -> list[Operation]:
        code = encode_operation(function, args, options)
        operations.append(Operation(keep_bits if function is posterize else function, args, options, code))
        return operations

    return note


def mend_posterize(transform: Compose) -> None:
    """Lets timm's RandAugment work with Pillow 13, which refuses what it asks for at full strength: `keep_bits`."""
    for part in transform.transforms:
        if isinstance(part, RandAugment):
            for operation in part.ops:
                if operation.aug_fn is posterize:
                    operation.aug_fn = keep_bits


def keep_bits(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """At full strength timm keeps 0 bits: black, which Pillow 13 refuses to make where older versions did."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)
