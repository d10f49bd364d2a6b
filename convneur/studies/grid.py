"""A scaling study: one recipe over sizes, with and without memory, unique images, epochs, learning rates and seeds.

Every point is an ordinary run of the series that the study is; its name says all of its axes, so that a study may grow
along any of them and keeps what it has. The axes are those of ConvNeur, and what is measured is classification.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path

from convneur.config import Config
from convneur.data.errors import DamagedError
from convneur.data.stores.choose import open_store
from convneur.models.convneur.config import ModelConfig, Placement, variant_named
from convneur.models.describe import ModelInfo, describe
from convneur.records.folder import METRICS_FILE, REPRODUCE_FILE
from convneur.records.metrics import or_nan, read_metrics
from convneur.records.provenance import read_record
from convneur.records.summary import read_result, read_summary
from convneur.studies.series import check_task, member, member_folder

TRAINING_PASSES = 3  # a forward pass, and a backward pass that costs two
LOCAL_ONLY: Placement = "none"


@dataclass(frozen=True)
class StudySettings:
    """The axes of a study; it has a run at every combination.

    Attributes:
        sizes: variants, or shapes such as "24x2-2-6-2", as model.variant takes them.
        held_out: further sizes, larger ones as a rule: they are trained too, but no fit sees them; it predicts them.
        placements: values of model.placement; "none" is the local-only control, which others are compared with.
        unique_images: values of data.subset; 0 for all images.
        epochs: values of schedule.epochs, over the unique images; empty for the recipe's own.
        lrs: values of optimizer.lr, of which every point takes the best; empty for the recipe's own.
        seeds: every combination is trained once with each of them.
    """

    sizes: list[str] = field(default_factory=lambda: ["n1", "n2", "n3", "m1", "m2", "m3", "m4"])
    held_out: list[str] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=lambda: ["per_stage", LOCAL_ONLY])
    unique_images: list[int] = field(default_factory=lambda: [0])
    epochs: list[int] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        for key in ("sizes", "placements", "unique_images", "seeds"):
            if not getattr(self, key):
                raise ValueError(f"study.{key} is empty, expected at least one value")
        for key in ("placements", "unique_images", "epochs", "lrs", "seeds"):
            if len(set(values := getattr(self, key))) < len(values):
                raise ValueError(f"study.{key} is {values}, expected none twice")
        sizes = [*self.sizes, *self.held_out]
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"study.sizes and study.held_out are {sizes}, expected none twice")
        for size in sizes:
            variant_named(size, "study.sizes or study.held_out")


@dataclass(frozen=True)
class StudyConfig(Config):
    """The recipe that all runs share, and the axes."""

    study: StudySettings = field(default_factory=StudySettings)

    def __post_init__(self) -> None:
        check_task(self)


@dataclass(frozen=True)
class Place:
    """Where in the study a run is.

    Attributes:
        size: variant or shape.
        placement: where its global branches are; "none" without any.
        unique_images: how many different images it learns from; 0 for all of the split.
        epochs: how often it sees each.
        lr: peak learning rate.
        seed: of the run.
    """

    size: str
    placement: Placement
    unique_images: int
    epochs: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The run's name."""
        images = self.unique_images or "all"
        return f"{self.size}-{self.placement}-{images}-e{self.epochs}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Point:
    """A finished run.

    Attributes:
        place: where in the study it is.
        params: parameters.
        macs: multiply-accumulates of its whole training: three forward passes for every image seen.
        images: images seen, repetitions counted.
        loss: cross-entropy on the held-out images, of the averaged weights where an average was kept.
        top1: fraction of those that the same weights classify rightly.
        hours: time of every GPU, or of every core that computed, in hours.
        device: what `hours` are of, "GPU" or "core".
        commit: commit of the code that it was started with, with "+ changes" if there were any; None if not known.
        folder: its folder.
    """

    place: Place
    params: int
    macs: float
    images: int
    loss: float
    top1: float
    hours: float
    device: str
    commit: str | None
    folder: Path


def study_runs(config: StudyConfig) -> dict[Place, Config]:
    """The configuration of every run; seed by seed, and from small to large as the sizes are given."""
    study = config.study
    runs = {}
    axes = (
        study.seeds,
        study.epochs or [config.schedule.epochs],
        study.unique_images,
        [*study.sizes, *study.held_out],
        study.lrs or [config.optimizer.lr],
        study.placements,
    )
    for seed, epochs, images, size, lr, placement in product(*axes):
        place = Place(size, placement, images, epochs, lr, seed)
        run = member(config, place.name, seed, replace(config.model, variant=size, placement=placement))
        runs[place] = replace(
            run,
            data=replace(run.data, subset=images),
            optimizer=replace(run.optimizer, lr=lr),
            schedule=replace(run.schedule, epochs=epochs),
        )
    return runs


@cache
def cost(model: ModelConfig, image_size: int) -> ModelInfo:
    """What a model of the study costs; counted once."""
    return describe(model, image_size)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: fraction of its steps that are made.
        finished: whether it has been evaluated and has a summary.
        weight: multiply-accumulates that all of its training takes.
        damaged: what is wrong with its files, so that there is no telling how far it is; None where nothing is.
    """

    done: float
    finished: bool
    weight: float
    damaged: str | None = None


def progress(config: StudyConfig) -> dict[Place, Progress]:
    """How far every run is, by what the runs have written. Reads the data's index."""
    sizes: dict[int, int] = {}
    found = {}
    for place, run in study_runs(config).items():
        if place.unique_images not in sizes:
            sizes[place.unique_images] = place.unique_images or len(open_store(run.data, run.data.train_split))
        batch = run.data.global_batch_size
        images = sizes[place.unique_images] // batch * batch * place.epochs
        weight = TRAINING_PASSES * 1e9 * cost(run.model, run.data.image_size).gmacs * images
        try:
            finished = read_summary(member_folder(run)) is not None
            records = [] if finished else read_metrics(member_folder(run))
        except DamagedError as error:
            found[place] = Progress(0.0, False, weight, str(error))
            continue
        done = 1.0 if finished else records[-1]["epoch"] / place.epochs if records else 0.0
        found[place] = Progress(done, finished, weight)
    return found


def finished_points(config: StudyConfig, damaged: list[str] | None = None) -> list[Point]:
    """The runs that are finished, in the order of the study.

    A line for each run that is damaged, and left out, goes to `damaged`; without it, DamagedError is raised.
    """
    points = []
    for place, run in study_runs(config).items():
        try:
            point = _point(place, run, member_folder(run))
        except DamagedError as error:
            if damaged is None:
                raise
            damaged.append(f"left out, for it is damaged: {error}")
        else:
            points += [point] if point else []
    return points


def _point(place: Place, run: Config, folder: Path) -> Point | None:
    found = read_result(folder)
    if found is None:
        return None
    summary, last = found
    averaged = summary.score_ema is not None
    model = cost(run.model, run.data.image_size)
    made_with = read_record(folder) if (folder / REPRODUCE_FILE).exists() else {"hardware": {}, "code": {}}
    hardware, code = made_with["hardware"], made_with["code"]
    ranks = hardware.get("world_size", 1)
    cores = re.match(r"[1-9]\d*", str(hardware.get("threads")))  # OMP_NUM_THREADS, which may be a list
    threads = int(cores[0]) if cores and not hardware.get("gpus") else 1
    commit = code.get("commit")
    names = [name + "_ema" * averaged for name in ("eval/loss", "eval/top1")]
    if not last.keys() >= set(names):
        raise DamagedError(f"{folder / METRICS_FILE}: its last evaluation has no loss or top-1 of averaged weights")
    return Point(
        place=place,
        params=model.params,
        macs=TRAINING_PASSES * 1e9 * model.gmacs * summary.images,
        images=summary.images,
        loss=or_nan(last[names[0]]),
        top1=or_nan(last[names[1]]),
        hours=summary.seconds / 3600 * ranks * threads,
        device="GPU" if hardware.get("gpus") else "core",
        commit=commit and commit + (" + changes" if code.get("diff") else ""),
        folder=folder,
    )


def best_rates(points: Sequence[Point]) -> tuple[list[Point], list[str]]:
    """The points at the learning rate that suits them best, by the mean loss of its seeds; and a line for each of
    them where that rate is the highest or lowest that was tried, so that a better one may lie beyond.
    """
    groups: dict[tuple[str, Placement, int, int], dict[float, list[Point]]] = {}
    for point in points:
        place = point.place
        key = place.size, place.placement, place.unique_images, place.epochs
        groups.setdefault(key, {}).setdefault(place.lr, []).append(point)
    chosen, notes = [], []
    for (size, placement, images, epochs), rates in groups.items():
        means = {lr: sum(point.loss for point in group) / len(group) for lr, group in rates.items()}
        best = min(means, key=means.__getitem__)
        chosen += rates[best]
        if len(rates) > 1 and best in (min(rates), max(rates)):
            end = "lowest" if best == min(rates) else "highest"
            notes.append(
                f"{size}, {placement}, {images or 'all'} images, {epochs} epochs: the best learning rate, {best:g}, is"
                f" the {end} tried; a better one may lie beyond it"
            )
    return chosen, notes
