"""The part of benchmarks/data.py that runs where MosaicML Streaming is installed: without ConvNeur.

    python benchmarks/streaming_reader.py SHARDS WORKERS BATCH

Writes the JPEGs of the WebDataset shards in the folder SHARDS to SHARDS.mds, reads them once, and prints images a
second, and a second of processor time.
"""

import io
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from common import processor_seconds
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop


class CropAndFlip(StreamingDataset):
    """Decoded and resized with Pillow."""

    def __init__(self, folder: Path, batch_size: int):
        super().__init__(local=str(folder), shuffle=True, batch_size=batch_size)
        self._transform = Compose([RandomResizedCrop(224), RandomHorizontalFlip(), PILToTensor()])

    def __getitem__(self, number: int) -> Any:
        """(3, 224, 224) uint8 and its label."""
        sample = super().__getitem__(number)
        return self._transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]


def write(shards: Path, folder: Path) -> None:
    """Copy images and labels of all training shards."""
    with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for path in sorted(shards.glob("train-*.tar")):
            with tarfile.open(path) as tar:
                contents = {member.name: tar.extractfile(member).read() for member in tar}
            for name, content in contents.items():
                if name.endswith(".jpg"):
                    writer.write({"image": content, "label": int(contents[name[:-3] + "cls"])})


def main() -> None:
    """Write if need be, read, print."""
    shards, workers, batch_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder = shards.with_suffix(".mds")
    if not (folder / "index.json").exists():
        write(shards, folder)
    torch.set_num_threads(1)
    dataset = CropAndFlip(folder, batch_size)
    start, before = time.perf_counter(), processor_seconds()
    seen = sum(len(images) for images, _ in DataLoader(dataset, batch_size=batch_size, num_workers=workers))
    print(seen / (time.perf_counter() - start), seen / (processor_seconds() - before))


if __name__ == "__main__":
    main()
