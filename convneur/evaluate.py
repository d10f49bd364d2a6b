"""Exact top-1 and top-5 on any number of ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from convneur.data.loader import EvalBatch
from convneur.data.mixing import Normalize


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
