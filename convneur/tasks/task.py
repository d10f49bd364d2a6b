"""What a task promises. The training step, the evaluation and the records of a run know nothing else of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from convneur.data.stream.batch import Batch, EvalBatch
from convneur.models.backbone import Model


class Metric(NamedTuple):
    """A score that has a name.

    Attributes:
        name: such as "top1"; `eval/top1` in metrics.jsonl, "top1" in summary.json and BEST.
        title: the name as people write it, such as "top-1".
        kind: what it measures, such as "accuracy".
        better: whether a higher or a lower value is the better one.
        form: how people read it, a format such as ".2%".
    """

    name: str
    title: str
    kind: str
    better: Literal["higher", "lower"]
    form: str

    def rank(self, score: float) -> float:
        """A number that is the higher the better the score is."""
        return score if self.better == "higher" else -score


class Scores(Protocol):
    """What an evaluation found, over all ranks."""

    @property
    def values(self) -> Mapping[str, float]:
        """Scores by the names of the task's metrics."""

    @property
    def samples(self) -> int:
        """How many samples they are about."""

    @property
    def warnings(self) -> Sequence[str]:
        """A line for everything that a reader of the scores should know."""


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
