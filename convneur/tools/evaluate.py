"""A checkpoint scored on its run's data, or on others with the same classes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from convneur.config import Config
from convneur.data.errors import InputError
from convneur.data.format.classes import map_classes, read_class_map
from convneur.data.format.manifest import Manifest
from convneur.data.stores.choose import open_store
from convneur.data.stores.store import Store
from convneur.data.stream.batch import EvalBatch
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.on_device import Normalize
from convneur.engine.build import autocast
from convneur.models.build import family_of
from convneur.monitoring.watchdog import Watchdog
from convneur.records.checkpoint import read_classes
from convneur.system.world import World
from convneur.tasks.classification import ClassificationScores, evaluate
from convneur.tasks.metrics import CLASSIFICATION
from convneur.tools.trained import open_trained


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
) -> ClassificationScores:
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
        InputError: the run is of another task than classification; the size or the crop is impossible; the checkpoint
            or the data can't be read, or the data have images of classes that the model isn't known to tell apart.
    """
    if crop is not None and not 0 < crop <= 1:
        raise InputError(f"--crop is {crop}, expected a number above 0 and at most 1")
    trained = open_trained(path, averaged)
    config = trained.config
    if config.task.name != CLASSIFICATION:
        raise InputError(
            f"{trained.checkpoint} has task.name {config.task.name!r}, expected {CLASSIFICATION!r}, which is all"
            " that can be evaluated apart from a run; the run's own scores are in its metrics.jsonl"
        )
    if image_size is not None and image_size < (smallest := family_of(config.model).smallest_image):
        raise InputError(f"--image-size is {image_size}, expected at least {smallest}")
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
