"""Exact top-1 and top-5 on any number of ranks."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from convneur.config import Config
from convneur.data.errors import InputError
from convneur.data.format.classes import map_classes, read_class_map
from convneur.data.format.shards import Manifest
from convneur.data.stores.store import Store, open_store
from convneur.data.stream.loader import EvalBatch, EvalLoader
from convneur.data.stream.on_device import Normalize
from convneur.engine.build import autocast
from convneur.models.convneur.model import SMALLEST_IMAGE
from convneur.monitoring.watchdog import Watchdog
from convneur.records.checkpoint import read_classes
from convneur.system.world import World
from convneur.tools.trained import open_trained


@dataclass(frozen=True)
class Scores:
    """Fractions of `images` whose label is the first, or among the first five, and their mean cross-entropy.

    An image whose logits aren't all finite counts as answered wrongly, and is left out of the loss.

    Attributes:
        bad: a line for each image that couldn't be read; those are not among `images`.
        among: of how many classes there are images, where the model tells more apart; else None. `top1` and `top5` are
            about all of the model's classes.
        top1_among: `top1` if the model chooses among those classes only, as is usual for ImageNet-A and -R.
        top5_among: `top5`, likewise.
        notes: what a reader of the scores should know.
        not_finite: how many of `images` have logits that aren't all finite.
    """

    top1: float
    top5: float
    loss: float
    images: int
    bad: tuple[str, ...] = ()
    among: int | None = None
    top1_among: float | None = None
    top5_among: float | None = None
    notes: tuple[str, ...] = ()
    not_finite: int = 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for everything that a reader of the scores should know."""
        lines = [*self.notes, *(f"left out of the evaluation: {line}" for line in self.bad)]
        if self.not_finite:
            lines.append(
                f"the logits of {self.not_finite:,} of {self.images:,} images aren't finite: they count as answered "
                "wrongly, and the loss is that of the others"
            )
        return tuple(lines)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    normalize: Normalize,
    autocast: torch.autocast,
    images: int,
    among: torch.Tensor | None = None,
) -> Scores:
    """Scores a whole, unpartitioned model on this rank's share of `images` images and adds up the ranks' counts.

    Args:
        model: images (B, 3, H, W) to logits (B, K).
        batches: this rank's.
        normalize: what makes the model's input of a batch's images.
        autocast: the precision to compute in.
        images: on all ranks.
        among: labels that there are images of, (P,) int64, for `Scores.top1_among`; None to leave that out.

    Raises:
        InputError: not one image can be read.
        RuntimeError: the ranks together did not see every image once.
    """
    model.eval()
    # Right at first, among five; the same if chosen from `among`; seen, bad, with logits that aren't finite.
    counts = torch.zeros(7, dtype=torch.int64, device=normalize.device)
    bad: list[str] = []
    loss = torch.zeros((), dtype=torch.float64, device=normalize.device)
    for batch in batches:
        labels, mask = batch.labels.to(normalize.device), batch.mask.to(normalize.device)
        with autocast:
            logits = model(normalize(batch.images)).float()
        answered = mask & logits.isfinite().all(1)
        counts[:2] += _hits(logits, labels, answered)
        counts[4] += mask.sum()
        counts[6] += mask.sum() - answered.sum()
        if among is not None:
            others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            others[among.to(logits.device)] = False
            counts[2:4] += _hits(logits.masked_fill(others, -math.inf), labels, answered)
        bad += [sample.reason for sample in batch.bad]
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        loss += losses.where(answered, 0.0).sum()
    counts[5] = len(bad)
    dist.all_reduce(counts)
    dist.all_reduce(loss)
    top1, top5, top1_among, top5_among, seen, unreadable, not_finite = counts.tolist()
    if seen + unreadable != images:
        raise RuntimeError(f"evaluation saw {seen} images and {unreadable} bad ones, expected each of {images} once")
    if unreadable:
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, bad)
        bad = sorted(line for part in gathered for line in part)
    if not seen:
        raise InputError(f"none of {images} images to evaluate on can be read; the first: {bad[0]}")
    mean = loss.item() / (seen - not_finite) if seen > not_finite else math.nan
    scores = Scores(top1 / seen, top5 / seen, mean, seen, tuple(bad), not_finite=not_finite)
    if among is None:
        return scores
    return replace(scores, among=len(among), top1_among=top1_among / seen, top5_among=top5_among / seen)


def _hits(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How many of the images (B,) that the mask keeps have their label first, and among the first five, (2,) int64."""
    hits = logits.topk(min(5, logits.shape[1])).indices.eq(labels[:, None]) & mask[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])


def evaluate_checkpoint(
    path: Path,
    world: World,
    *,
    data_root: str | None = None,
    split: str | None = None,
    averaged: bool = False,
    image_size: int | None = None,
    crop: float | None = None,
    class_map: Path | None = None,
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
        class_map: file that says which class of the model each of the data is; see
            `convneur.data.format.classes.read_class_map`. None where they have the same names.

    Raises:
        InputError: the size or the crop is impossible; the checkpoint or the data can't be read, or the data have
            images of classes that the model isn't known to tell apart.
    """
    if image_size is not None and image_size < SMALLEST_IMAGE:
        raise InputError(f"--image-size is {image_size}, expected at least {SMALLEST_IMAGE}")
    if crop is not None and not 0 < crop <= 1:
        raise InputError(f"--crop is {crop}, expected a number above 0 and at most 1")
    trained = open_trained(path, averaged)
    config = trained.config
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
    targets, among, notes = _targets(trained.checkpoint, config, store, data.root, class_map)
    model = trained.model(world.device)
    loader = EvalLoader(data, store, rank=world.rank, world_size=world.size)
    precision = autocast(config.deepspeed, world.device)
    # On a machine that may be far slower than the run's, a batch has the time that there an evaluation has.
    patience = replace(config.watchdog, seconds=config.watchdog.seconds and config.watchdog.long_seconds)
    with Watchdog(patience, None, world.rank) as watchdog:
        batches = _relabelled(loader, targets, watchdog)
        scores = evaluate(model, batches, Normalize(data, world.device), precision, len(store), among)
    return replace(scores, notes=notes)


def _relabelled(loader: EvalLoader, targets: torch.Tensor, watchdog: Watchdog) -> Iterator[EvalBatch]:
    for batch in loader:
        yield batch._replace(labels=targets[batch.labels])
        watchdog.step()


def _targets(
    checkpoint: Path, config: Config, store: Store, root: str, class_map: Path | None
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[str, ...]]:
    """The model's label for each of the data's, those there are images of if they are fewer, and what is to be said.

    Raises InputError where the model isn't known to tell a class apart that there are images of.
    """
    known, notes = trained_classes(checkpoint, config)
    if not known:
        if class_map:
            raise InputError(f"{checkpoint} doesn't keep the names of its classes, which --class-map would refer to")
        if len(store.classes) != config.model.num_classes:
            raise InputError(
                f"{checkpoint} tells {config.model.num_classes} classes apart but {root} has {len(store.classes)}; "
                "evaluate it on data with the classes it was trained on"
            )
        known = store.classes
    present = np.flatnonzero(store.class_samples())
    given = read_class_map(class_map) if class_map else None
    labels = map_classes(store.classes, present, known, given, f"{root}, split '{config.data.val_split}',")
    among = np.unique(labels[present])
    return torch.from_numpy(labels), torch.from_numpy(among) if len(among) < len(known) else None, notes


def trained_classes(checkpoint: Path, config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a checkpoint's classes, none where nobody knows; and a line if it isn't the checkpoint that says so.

    An older one doesn't keep them: they are its dataset's then, if that is still there.
    """
    if names := read_classes(checkpoint):
        return names, ()
    try:
        names = Manifest.read(Path(config.data.root)).classes
    except InputError:
        names = ()
    if len(names) != config.model.num_classes:
        return (), (f"{checkpoint} doesn't keep the names of its classes: labels are taken for their numbers",)
    return names, (f"{checkpoint} doesn't keep the names of its classes: they are taken from {config.data.root}",)
