"""Which store a dataset is read through."""

import os
import tempfile
from pathlib import Path

from convneur.data.config import DataConfig
from convneur.data.format.manifest import Manifest
from convneur.data.stores.beton import BetonStore
from convneur.data.stores.cache import ShardCache
from convneur.data.stores.store import Store, Subset
from convneur.data.stores.tar import TarStore


def open_store(config: DataConfig, split: str) -> Store:
    """Opens a split of the dataset at `config.root`, in the format that `config.format` and `config.engine` ask for.

    Raises:
        InputError: it can't be used; see `TarStore` and `BetonStore`.
    """
    subset = Subset(config.subset, config.subset_seed) if config.subset and split == config.train_split else None
    if reads_beton(config):
        return BetonStore(config.root, split, subset)
    default = Path(tempfile.gettempdir()) / f"convneur-cache-{os.getuid()}"
    budget = round(config.cache_gb * 1e9)
    cache = ShardCache(Path(config.cache_dir or default), budget, private=not config.cache_dir)
    return TarStore(config.root, split, cache, subset)


def reads_beton(config: DataConfig) -> bool:
    """Whether the dataset is read from files in FFCV's format.

    Raises:
        InputError: the format has to be looked up, and there is no dataset.
    """
    if config.format == "auto":
        return config.engine == "ffcv" or not Manifest.read(Path(config.root)).has_shards
    return config.format == "ffcv"
