"""Which loader reads the training samples."""

from convneur.data.config import DataConfig
from convneur.data.loader import TrainLoader
from convneur.data.store import Store


def build_train_loader(
    config: DataConfig, store: Store, *, seed: int, rank: int, world_size: int, accumulation: int
) -> TrainLoader:
    """Build the loader of `config.engine`; see `TrainLoader` for the arguments."""
    loader = TrainLoader
    if config.engine == "ffcv":
        from convneur.data.ffcv_engine import FfcvLoader  # FFCV is optional, and takes seconds to import

        loader = FfcvLoader
    return loader(config, store, seed=seed, rank=rank, world_size=world_size, accumulation=accumulation)
