"""Exact top-1 and top-5 on any number of ranks."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from convneur.checkpoint import CONFIG_FILE, find_checkpoint, load_weights
from convneur.config import load_config
from convneur.data.errors import InputError
from convneur.data.loader import EvalBatch, EvalLoader
from convneur.data.mixing import Normalize
from convneur.data.store import TarStore
from convneur.engine import autocast
from convneur.model import ConvNeur
from convneur.world import World


@dataclass(frozen=True)
class Scores:
    """Fractions of `images` whose label is the first, or among the first five, and their mean cross-entropy."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[EvalBatch], normalize: Normalize, autocast: torch.autocast, images: int
) -> Scores:
    """Scores a whole, unpartitioned model on this rank's share of `images` images and adds up the ranks' counts.

    Raises:
        RuntimeError: the ranks together did not see every image once.
    """
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=normalize.device)  # right at first, among five, seen
    loss = torch.zeros((), dtype=torch.float64, device=normalize.device)
    for batch in batches:
        labels, mask = batch.labels.to(normalize.device), batch.mask.to(normalize.device)
        with autocast:
            logits = model(normalize(batch.images)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices.eq(labels[:, None]) & mask[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), mask.sum()])
        loss += (F.cross_entropy(logits, labels, reduction="none").double() * mask).sum()
    dist.all_reduce(counts)
    dist.all_reduce(loss)
    top1, top5, seen = counts.tolist()
    if seen != images:
        raise RuntimeError(f"evaluation saw {seen} images, expected each of {images} once")
    return Scores(top1 / seen, top5 / seen, loss.item() / seen, seen)


def evaluate_checkpoint(
    path: Path, world: World, *, data_root: str | None, split: str | None, averaged: bool
) -> Scores:
    """Scores a checkpoint, or the newest of a run, as the run itself would. Collective.

    Args:
        path: folder of the checkpoint or of the run.
        world: this process among the ranks; any number of them gives the same scores.
        data_root: dataset to evaluate on; None for the run's own.
        split: split to evaluate on; None for the run's own.
        averaged: whether to take the averaged weights.

    Raises:
        InputError: the checkpoint or the data can't be read, or have different numbers of classes.
    """
    checkpoint = find_checkpoint(path)
    config = load_config([checkpoint / CONFIG_FILE])
    data = replace(config.data, root=data_root or config.data.root, val_split=split or config.data.val_split)
    store = TarStore(data.root, data.val_split)
    if len(store.classes) != config.model.num_classes:
        raise InputError(
            f"{checkpoint} tells {config.model.num_classes} classes apart but {data.root} has {len(store.classes)}; "
            "evaluate it on data with the classes it was trained on"
        )
    model = ConvNeur(config.model).to(world.device)
    model.load_state_dict(load_weights(checkpoint, averaged))
    loader = EvalLoader(data, store, rank=world.rank, world_size=world.size)
    return evaluate(model, loader, Normalize(data, world.device), autocast(config.deepspeed, world.device), len(store))
