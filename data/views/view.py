"""What is shown of an image, as plain data: for training drawn at random, for evaluation the centre."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image

from convneur.data.config import DataConfig
from convneur.data.native.operations import Operation as Code

LONGEST = 64
"""How many times its shorter side evaluation sees of an image's longer side; its centre crop shows far less."""


class Operation(NamedTuple):
    """A change to the colours or the shape of an image, as a library's function makes it.

    Attributes:
        function: takes an image and what follows.
        args: what was drawn.
        options: the rest.
        code: the same in numbers, see `convneur.data.native.operations`; None where C++ doesn't know it.
    """

    function: Callable[..., Image.Image]
    args: tuple[float, ...]
    options: dict[str, Any]
    code: Code | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, changed."""
        return self.function(image, *self.args, **self.options)


class View(NamedTuple):
    """A rectangle of an image, resized; of that a square, flipped and changed. All in pixels.

    Attributes:
        top, left, height, width: the rectangle.
        resized: height and width that it gets.
        window: first row and column of the square within that.
        flips: left to right, top to bottom.
        operations: made one after the other.
    """

    top: int
    left: int
    height: int
    width: int
    resized: tuple[int, int]
    window: tuple[int, int] = (0, 0)
    flips: tuple[bool, bool] = (False, False)
    operations: tuple[Operation, ...] = ()


def central_view(config: DataConfig, height: int, width: int) -> View:
    """What evaluation sees: the shorter side resized to image_size / eval_crop, the centre cut out, as timm does."""
    limit = LONGEST * min(height, width)  # resized as a whole, an image with longer sides may take gigabytes
    top, left = (max(side - limit, 0) // 2 for side in (height, width))
    height, width = height - 2 * top, width - 2 * left
    shorter = math.floor(config.image_size / config.eval_crop)
    resized = tuple(
        shorter if side == min(height, width) else int(shorter * side / min(height, width)) for side in (height, width)
    )
    first = tuple(round((side - config.image_size) / 2) for side in resized)
    return View(top, left, height, width, (resized[0], resized[1]), (first[0], first[1]))
