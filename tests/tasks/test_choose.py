"""A task of its own: two rows, and it is trained, scored by its own metric, resumed and exported."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_run import small_config
from torch import Tensor, nn

from convneur.config import Config, TaskConfig
from convneur.data.config import AugmentConfig
from convneur.data.errors import InputError
from convneur.data.stream.batch import Batch, EvalBatch
from convneur.data.stream.on_device import Normalize
from convneur.models.backbone import Model
from convneur.models.build import build_model
from convneur.records.metrics import read_metrics
from convneur.records.summary import read_result
from convneur.system.world import World
from convneur.tasks.choose import TASKS
from convneur.tasks.metrics import METRICS, Metric
from convneur.tools.evaluate import evaluate_checkpoint
from convneur.tools.export import export_checkpoint
from convneur.train import train


@dataclass(frozen=True)
class _Scores:
    values: dict[str, float]
    warnings: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


class Ordinal:
    """Classes as numbers: one output, the mean absolute error in classes."""

    metrics = (Metric("mae", "MAE", "error", "lower", ".3f"),)

    def __init__(self, config: Config, device: torch.device) -> None:
        self._model = replace(config.model, num_classes=1)
        self._normalize = Normalize(config.data, device)

    def build_model(self) -> Model:
        return build_model(self._model)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._normalize(batch.images), batch.labels.float()

    def losses(self, model: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": (model(images)[:, 0].float() - targets).square().mean()}

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[EvalBatch], samples: int) -> _Scores:
        model.eval()
        error = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            answers = model(self._normalize(batch.images))[:, 0]
            error += ((answers - batch.labels).abs() * batch.mask).sum()
        dist.all_reduce(error)
        return _Scores({"mae": error.item() / samples})


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "ordinal", Ordinal)
    monkeypatch.setitem(METRICS, "ordinal", Ordinal.metrics)


def test_the_best_is_the_lowest(digits: Path, world: World, tmp_path: Path) -> None:
    config = small_config(digits, 1, keep_checkpoints=1)
    config = replace(
        config,
        task=TaskConfig("ordinal"),
        data=replace(config.data, augment=AugmentConfig(hflip=0.0, randaugment="", mixup=0, cutmix=0)),
        schedule=replace(config.schedule, epochs=2),
    )
    folder = tmp_path / "ordinal"
    train(config, world, folder)
    result = read_result(folder)
    assert result is not None
    summary, last = result
    assert (summary.metric, summary.score, summary.score_ema) == ("mae", last["eval/mae"], last["eval/mae_ema"])
    scores = {
        (record[f"eval/mae{suffix}"], record["step"], weights)
        for record in read_metrics(folder)
        if "eval/mae" in record
        for suffix, weights in (("", "raw"), ("_ema", "averaged"))
    }
    assert len(scores) == 4
    mae, step, weights = min(scores)
    assert json.loads((folder / "checkpoints" / "BEST").read_bytes()) == {"step": step, "mae": mae, "weights": weights}
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()

    export = export_checkpoint(folder, "safetensors", tmp_path / "ordinal.safetensors")
    assert export.difference == 0
    with pytest.raises(InputError, match=r"has task.name 'ordinal', expected 'classification'"):
        evaluate_checkpoint(folder, world)
    with pytest.raises(InputError, match=r"has task.name = ordinal, the run is configured with classification"):
        train(replace(config, task=TaskConfig()), world, folder, resume="auto")
