"""Training images decoded, cropped and resized on the GPU: `data.decode: nvjpeg`.

Order, crops, flips and replacements are those of `TrainLoader`; pixels are others: nvJPEG's inverse transform and
upsampling, and PyTorch's antialiased resize in float32. Only images that are proven, those of tiled shards, go this
way, as nvJPEG takes damage for good; workers make the others as ever.

Legend: b samples in a micro-batch, H x W pixels.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.stores.store import Store
from convneur.data.stream.batch import Batch, Request
from convneur.data.stream.train import Drawn, LastImage, Made, TrainDataset, TrainLoader
from convneur.data.stream.workers import Slots
from convneur.data.views.view import View


class _File(NamedTuple):
    """A JPEG that is left to the GPU, and what is shown of it, at its place in the micro-batch."""

    offset: int
    image: bytes
    view: View


class _MadeOfFiles(NamedTuple):
    """What a worker has made of a micro-batch, and what it has left to the GPU."""

    made: Made
    files: list[_File]


class NvjpegLoader(TrainLoader):
    """`TrainLoader` whose images lie on the GPU, most of them decoded there.

    Args:
        device: where; None for the current GPU.

    Raises:
        InputError: there is no GPU.
    """

    def __init__(
        self,
        config: DataConfig,
        store: Store,
        *,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int,
        device: torch.device | None = None,
    ):
        super().__init__(config, store, seed=seed, rank=rank, world_size=world_size, accumulation=accumulation)
        if device is None and not torch.cuda.is_available():
            raise InputError("data.decode is nvjpeg, which needs an NVIDIA GPU, and there is none: set it to cpu")
        self._device = device or torch.device("cuda", torch.cuda.current_device())

    def _dataset(self, slots: Slots) -> "_FilesDataset":
        return _FilesDataset(self._store, self._transform, self._seed, self._config.repeats, slots)

    def _finished(self, made: Made | _MadeOfFiles, slots: Slots) -> Batch:
        assert isinstance(made, _MadeOfFiles)
        batch = made.made.batch(slots)
        images = batch.images.to(self._device, non_blocking=True)
        contents = [torch.frombuffer(bytearray(file.image), dtype=torch.uint8) for file in made.files]
        if contents:
            decoded = decode_jpeg(contents, mode=ImageReadMode.RGB, device=self._device)
            for file, pixels in zip(made.files, decoded, strict=True):
                images[file.offset] = self._shown(pixels, file.view)
        return replace(batch, images=images)

    def _shown(self, pixels: torch.Tensor, view: View) -> torch.Tensor:
        """What a view shows of an image (3, height, width) uint8, (3, H, W) uint8."""
        part = pixels[:, view.top : view.top + view.height, view.left : view.left + view.width]
        mode = self._config.interpolation
        resized = F.interpolate(part[None].float(), view.resized, mode=mode, antialias=True)[0]
        sides = [side for side, flipped in zip((2, 1), view.flips, strict=True) if flipped]
        return resized.round().clamp(0, 255).to(torch.uint8).flip(sides)


class _FilesDataset(TrainDataset):
    """Leaves proven JPEGs as they are."""

    def __getitem__(self, numbered: tuple[int, Request]) -> _MadeOfFiles | InputError:  # type: ignore[override]
        self._files: list[_File] = []
        made = super().__getitem__(numbered)
        return made if isinstance(made, InputError) else _MadeOfFiles(made, self._files)

    def _show(self, last: LastImage, epoch: int, drawn: Drawn, images: torch.Tensor, offset: int, index: int) -> int:
        sample = drawn.sample
        if index != drawn.number or not drawn.view or isinstance(sample, Exception) or not sample.proven:
            return super()._show(last, epoch, drawn, images, offset, index)
        self._files.append(_File(offset, sample.image, drawn.view))
        return sample.label
