"""Classification: images of one class each. Exact top-1 and top-5 on any number of ranks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from convneur.config import Config
from convneur.data.errors import InputError
from convneur.data.stream.batch import Batch, EvalBatch
from convneur.data.stream.on_device import Normalize
from convneur.engine.build import autocast
from convneur.models.backbone import Backbone
from convneur.models.build import build_model
from convneur.tasks.metrics import METRICS
from convneur.tasks.mixing import DeviceTransform

cross_entropy = SoftTargetCrossEntropy()


class Classification:
    """Which of K classes is an image of?

    loss = -sum_k y_k log softmax(logits)_k, with y the smoothed and mixed labels (b, K), averaged over the micro-batch.

    Args:
        config: the run's.
        device: where the model is.
    """

    metrics = METRICS["classification"]

    def __init__(self, config: Config, device: torch.device):
        self._model = config.model
        self._transform = DeviceTransform(
            config.data,
            num_classes=config.model.num_classes,
            label_smoothing=config.train.label_smoothing,
            seed=config.run.seed,
            device=device,
        )
        self._normalize = Normalize(config.data, device)
        self._autocast = autocast(config.deepspeed, device)

    def build_model(self) -> Backbone:
        """The backbone with its classifier: images (B, 3, H, W) to logits (B, K)."""
        return build_model(self._model)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (b, 3, H, W), erased and mixed, and distributions over the classes (b, K)."""
        return self._transform(batch)

    def losses(self, model: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The cross-entropy of logits (b, K) and targets (b, K), in float32."""
        return {"loss": cross_entropy(model(images).float(), targets)}

    def evaluate(self, model: nn.Module, batches: Iterable[EvalBatch], samples: int) -> "ClassificationScores":
        """Counts the images whose label is the first, or among the first five, and means their loss; see `evaluate`."""
        return evaluate(model, batches, self._normalize, self._autocast, samples)


@dataclass(frozen=True)
class ClassificationScores:
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
    def values(self) -> dict[str, float]:
        """What the names of the metrics stand for."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for everything that a reader of the scores should know."""
        return *self.notes, *(f"left out of the evaluation: {line}" for line in self.bad), *self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """Those of them that are about the model's answers."""
        if not self.not_finite:
            return ()
        return (
            f"the logits of {self.not_finite:,} of {self.images:,} images aren't finite: they count as answered "
            "wrongly, and the loss is that of the others",
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    normalize: Normalize,
    autocast: torch.autocast,
    images: int,
    among: torch.Tensor | None = None,
) -> ClassificationScores:
    """Scores a whole, unpartitioned model on this rank's share of `images` images and adds up the ranks' counts.

    Args:
        model: images (B, 3, H, W) to logits (B, K).
        batches: this rank's.
        normalize: what makes the model's input of a batch's images.
        autocast: the precision to compute in.
        images: on all ranks.
        among: labels that there are images of, (P,) int64, for `top1_among`; None to leave that out.

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
    scores = ClassificationScores(top1 / seen, top5 / seen, mean, seen, tuple(bad), not_finite=not_finite)
    if among is None:
        return scores
    return replace(scores, among=len(among), top1_among=top1_among / seen, top5_among=top5_among / seen)


def _hits(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How many of the images (B,) that the mask keeps have their label first, and among the first five, (2,) int64."""
    hits = logits.topk(min(5, logits.shape[1])).indices.eq(labels[:, None]) & mask[:, None]
    return torch.stack([hits[:, 0].sum(), hits.sum()])
