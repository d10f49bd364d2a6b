"""What is asked of a worker for a micro-batch, and what comes back.

Legend: b samples in a micro-batch, H x W pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class BadSample(NamedTuple):
    """A sample that can't be read.

    Attributes:
        number: which one of the store's.
        reason: one line that names shard, split and key, and says what is wrong.
    """

    number: int
    reason: str


class Request(NamedTuple):
    """All that a micro-batch depends on: the samples `indices` stand at places `first`, `first` + 1, ... of `epoch`.

    `repetitions` says for each which of its views is due.
    """

    epoch: int
    step: int
    lanes: range
    first: int
    indices: np.ndarray
    repetitions: np.ndarray


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images: (b, 3, H, W) uint8 in channels_last memory format, lane by lane.
        labels: (b,) int64.
        indices: (b,) int64, the samples' numbers in the store.
        repetitions: (b,) int64, 0..data.repeats-1: which of a sample's views this is.
        epoch: counted from 0.
        step: optimizer steps before this one, over all epochs.
        lanes: lanes that contributed, b / len(lanes) samples each.
        bad: samples that should have been here; others stand in for them, and `labels` and `indices` are the others'.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    epoch: int
    step: int
    lanes: range
    repetitions: torch.Tensor
    bad: tuple[BadSample, ...] = ()


class EvalBatch(NamedTuple):
    """Samples to evaluate, b = eval_batch_size of them on each rank.

    Attributes:
        images: (b, 3, H, W) uint8; zeros where masked.
        labels: (b,) int64; zeros where masked.
        mask: (b,) bool, False for padding and for bad samples.
        bad: samples that should have been here.
    """

    images: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    bad: tuple[BadSample, ...] = ()
