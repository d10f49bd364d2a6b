"""Images decoded on the device: the same stream, nearly the same pixels. The device is a CPU here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convneur.data.check import check_data
from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError
from convneur.data.prepare.synthetic import prepare_synthetic
from convneur.data.stores.tar import TarStore
from convneur.data.stream.choose import build_train_loader
from convneur.data.stream.nvjpeg import NvjpegLoader
from convneur.data.stream.train import TrainLoader

# torchvision's decoders are to move to TorchCodec.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
SPLIT = {"seed": 0, "rank": 0, "world_size": 1, "accumulation": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("tiled") / "data"
    prepare_synthetic(folder, classes=3, images=60, height=75, width=100, processes=1, shard_samples=20, tiles=4)
    augment = AugmentConfig(randaugment="", vflip=0.5)
    return DataConfig(
        root=str(folder), decode="nvjpeg", image_size=32, global_batch_size=24, lanes=4, workers=0, augment=augment
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_and_the_pixels_nearly(config: DataConfig, workers: int) -> None:
    store, config = TarStore(config.root, "train"), replace(config, workers=workers)
    there = NvjpegLoader(config, store, **SPLIT, device=torch.device("cpu"))
    here = TrainLoader(config, store, **SPLIT)
    for ours, theirs in zip(there.iterate(0, 4), here.iterate(0, 4), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.indices, other.indices)
            assert torch.equal(one.labels, other.labels)
            assert (one.images.shape, one.images.dtype) == (other.images.shape, torch.uint8)
            off = (one.images.int() - other.images.int()).abs()
            assert 0 < off.float().mean() < 0.5  # flipped or cropped otherwise, it would be 10 and more
            assert off.max() <= 4


def test_damage_is_replaced_alike(config: DataConfig, tmp_path: Path) -> None:
    prepare_synthetic(tmp_path / "data", classes=3, images=60, height=75, width=100, processes=1, tiles=4)
    shard = next((tmp_path / "data").glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    config = replace(config, root=str(tmp_path / "data"))
    store = TarStore(config.root, "train")
    loaders = (NvjpegLoader(config, store, **SPLIT, device=torch.device("cpu")), TrainLoader(config, store, **SPLIT))
    seen = [[batch.indices.tolist() for step in loader.iterate(0, 4) for batch in step] for loader in loaders]
    assert seen[0] == seen[1]
    assert loaders[0].bad_samples == loaders[1].bad_samples
    assert len(loaders[0].bad_samples) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(config: DataConfig) -> None:
    with pytest.raises(InputError, match=r"data\.decode is nvjpeg, which needs an NVIDIA GPU, and there is none"):
        build_train_loader(config, TarStore(config.root, "train"), **SPLIT)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"augment": AugmentConfig()}, "data.augment.randaugment"),
        ({"interpolation": "area"}, "data.interpolation"),
        ({"engine": "ffcv", "interpolation": "area"}, "data.decode"),
    ],
)
def test_what_it_cannot_do_is_refused(config: DataConfig, change: dict[str, object], what: str) -> None:
    with pytest.raises(InputError, match=f"^{what} is .* must be"):
        check_data(replace(config, **change), num_classes=3, world_size=1, accumulation=2)  # type: ignore[arg-type]


def test_a_run_does_not_change_where_it_decodes(config: DataConfig) -> None:
    store = TarStore(config.root, "train")
    there = NvjpegLoader(config, store, **SPLIT, device=torch.device("cpu"))
    with pytest.raises(InputError, match="decode 'nvjpeg', this run 'cpu'"):
        TrainLoader(replace(config, decode="cpu"), store, **SPLIT).check_state(there.state(3))
