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
from convneur.data.store import open_store
from convneur.engine import autocast
from convneur.model import SMALLEST_IMAGE, ConvNeur
from convneur.world import World


@dataclass(frozen=True)
class Scores:
    """Fractions of `images` whose label is the first, or among the first five, and their mean cross-entropy.

    `bad` has a line for each image that couldn't be read; those are not among `images`.
    """

    top1: float
    top5: float
    loss: float
    images: int
    bad: tuple[str, ...] = ()


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[EvalBatch], normalize: Normalize, autocast: torch.autocast, images: int
) -> Scores:
    """Scores a whole, unpartitioned model on this rank's share of `images` images and adds up the ranks' counts.

    Raises:
        InputError: not one image can be read.
        RuntimeError: the ranks together did not see every image once.
    """
    model.eval()
    counts = torch.zeros(4, dtype=torch.int64, device=normalize.device)  # right at first, among five, seen, bad
    bad: list[str] = []
    loss = torch.zeros((), dtype=torch.float64, device=normalize.device)
    for batch in batches:
        labels, mask = batch.labels.to(normalize.device), batch.mask.to(normalize.device)
        with autocast:
            logits = model(normalize(batch.images)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices.eq(labels[:, None]) & mask[:, None]
        counts[:3] += torch.stack([hits[:, 0].sum(), hits.sum(), mask.sum()])
        bad += [sample.reason for sample in batch.bad]
        loss += (F.cross_entropy(logits, labels, reduction="none").double() * mask).sum()
    counts[3] = len(bad)
    dist.all_reduce(counts)
    dist.all_reduce(loss)
    top1, top5, seen, unreadable = counts.tolist()
    if seen + unreadable != images:
        raise RuntimeError(f"evaluation saw {seen} images and {unreadable} bad ones, expected each of {images} once")
    if unreadable:
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, bad)
        bad = sorted(line for part in gathered for line in part)
    if not seen:
        raise InputError(f"none of {images} images to evaluate on can be read; the first: {bad[0]}")
    return Scores(top1 / seen, top5 / seen, loss.item() / seen, seen, tuple(bad))


def evaluate_checkpoint(
    path: Path,
    world: World,
    *,
    data_root: str | None = None,
    split: str | None = None,
    averaged: bool = False,
    image_size: int | None = None,
    crop: float | None = None,
) -> Scores:
    """Scores a checkpoint, or the newest of a run, as the run itself would. Collective.

    Args:
        path: folder of the checkpoint or of the run.
        world: this process among the ranks; any number of them gives the same scores.
        data_root: dataset to evaluate on; None for the run's own.
        split: split to evaluate on; None for the run's own.
        averaged: whether to take the averaged weights.
        image_size: side of the images in pixels, which need not be that of training; None for the run's own.
        crop: fraction of the resized image's side that the centre crop keeps; None for the run's own.

    Raises:
        InputError: the size or the crop is impossible; the checkpoint or the data can't be read, or have different
            numbers of classes.
    """
    if image_size is not None and image_size < SMALLEST_IMAGE:
        raise InputError(f"--image-size is {image_size}, expected at least {SMALLEST_IMAGE}")
    if crop is not None and not 0 < crop <= 1:
        raise InputError(f"--crop is {crop}, expected a number above 0 and at most 1")
    checkpoint = find_checkpoint(path)
    config = load_config([checkpoint / CONFIG_FILE])
    # The engine is training's: left out, it doesn't ask for a format that other data may not have.
    data = replace(
        config.data,
        root=data_root or config.data.root,
        val_split=split or config.data.val_split,
        image_size=image_size or config.data.image_size,
        eval_crop=crop or config.data.eval_crop,
        engine="webdataset",
    )
    store = open_store(data, data.val_split)
    if len(store.classes) != config.model.num_classes:
        raise InputError(
            f"{checkpoint} tells {config.model.num_classes} classes apart but {data.root} has {len(store.classes)}; "
            "evaluate it on data with the classes it was trained on"
        )
    model = ConvNeur(config.model).to(world.device)
    missing, unknown = model.load_state_dict(load_weights(checkpoint, averaged), strict=False)
    if missing or unknown:
        raise InputError(
            f"{checkpoint} is of another version of {config.model.variant}: {len(missing)} parameters are missing and "
            f"{len(unknown)} unknown, such as {[*missing, *unknown][0]}; evaluate it with the version that wrote it"
        )
    loader = EvalLoader(data, store, rank=world.rank, world_size=world.size)
    return evaluate(model, loader, Normalize(data, world.device), autocast(config.deepspeed, world.device), len(store))
