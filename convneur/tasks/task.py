"""What a task promises. The training step, the evaluation and the records of a run know nothing else of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from convneur.data.stream.batch import Batch, EvalBatch
from convneur.models.backbone import Model
from convneur.tasks.metrics import Metric


class Scores(Protocol):
    """What an evaluation found, over all ranks."""

    @property
    def values(self) -> Mapping[str, float]:
        """Scores by the names of the task's metrics."""

    @property
    def warnings(self) -> Sequence[str]:
        """A line for everything that a reader of the scores should know."""

    @property
    def faults(self) -> Sequence[str]:
        """Those of them that are about the model's answers, and not about the samples."""


class Task(Protocol):
    """What a run trains for: a model, what it is to answer, and how good its answers are."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """What an evaluation finds; the first decides which checkpoint is the best."""

    def build_model(self) -> Model:
        """The model with initial weights, drawn from torch's generator, on the CPU."""

    def prepare(self, batch: Batch) -> tuple[Tensor, Any]:
        """A micro-batch as the model takes it: images (b, 3, H, W) on the device, and targets for `losses`.

        What is random in it depends on the run's seed and on each sample's place alone.
        """

    def losses(self, model: Callable[[Tensor], Any], images: Tensor, targets: Any) -> dict[str, Tensor]:
        """Scalars by name; "loss", a mean over the micro-batch, is the one that training steps on."""

    def evaluate(self, model: nn.Module, batches: Iterable[EvalBatch], samples: int) -> Scores:
        """Scores a whole, unpartitioned model on this rank's share of `samples` samples. Collective.

        Raises:
            InputError: not one sample can be read.
            RuntimeError: the ranks together did not see every sample once.
        """
