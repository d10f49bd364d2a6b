"""Which loader reads the training samples."""

from convneur.data.config import DataConfig
from convneur.data.stores.store import Store
from convneur.data.stream.train import TrainLoader


def build_train_loader(
    config: DataConfig, store: Store, *, seed: int, rank: int, world_size: int, accumulation: int
) -> TrainLoader:
    """Builds the loader of `config.engine` and `config.decode`; see `TrainLoader` for the arguments."""
    loader = TrainLoader
    if config.engine == "ffcv":
        from convneur.data.stream.ffcv import FfcvLoader  # FFCV is optional, and takes seconds to import

        loader = FfcvLoader
    elif config.decode == "nvjpeg":
        from convneur.data.stream.nvjpeg import NvjpegLoader  # the only one with torchvision's decoders

        loader = NvjpegLoader
    return loader(config, store, seed=seed, rank=rank, world_size=world_size, accumulation=accumulation)
