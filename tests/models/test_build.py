"""A backbone of another family: one row, and it is trained, evaluated and resumed as ConvNeur is, BatchNorm and all."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compared_runs import bits
from safetensors.torch import load_file
from small_run import small_config
from torch import Tensor, nn

from convneur.config import Config, load_config
from convneur.data.errors import InputError
from convneur.launch.cli import main
from convneur.limits import check_values
from convneur.models.backbone import Backbone
from convneur.models.build import FAMILIES, Family, build_model
from convneur.models.convneur.config import ModelConfig
from convneur.models.describe import describe
from convneur.records.listing import find_checkpoint, list_checkpoints
from convneur.system.world import World
from convneur.tools.evaluate import evaluate_checkpoint
from convneur.train import train


class Plain(Backbone):
    """Two convolutions with running statistics, as many channels as the name says, and a head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = int(config.variant.partition(":")[2])
        self.features = nn.Sequential(
            nn.Conv2d(config.in_chans, width, 4, 4), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 2, 2)
        )
        self.head = nn.Linear(width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "plain", Family(Plain, smallest_image=8))


@pytest.fixture
def config(digits: Path) -> Config:
    return replace(small_config(digits, 1, keep_checkpoints=3), model=ModelConfig("plain:24", num_classes=10))


def test_trained_stopped_and_resumed(config: Config, world: World, tmp_path: Path) -> None:
    whole = train(config, world, tmp_path / "whole")
    assert whole is not None
    middle = next(path for path in list_checkpoints(tmp_path / "whole" / "checkpoints") if path.name.endswith("4"))
    again = train(config, world, tmp_path / "again", resume=str(middle))
    assert again is not None
    assert (again.score, again.score_ema) == (whole.score, whole.score_ema)
    first, second = (find_checkpoint(tmp_path / name) for name in ("whole", "again"))
    files = sorted(str(path.relative_to(first)) for path in first.rglob("*.safetensors"))
    assert "buffers.safetensors" in files
    for name in files:
        ours, theirs = load_file(first / name), load_file(second / name)
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(bits(ours[key]), bits(theirs[key])) for key in ours if ours[key].dtype == torch.float32
        ), name
    for averaged, score in ((False, whole.score), (True, whole.score_ema)):
        assert evaluate_checkpoint(first, world, averaged=averaged).top1 == score


def test_described(capsys: pytest.CaptureFixture[str]) -> None:
    info = describe(ModelConfig("plain:8", num_classes=5), 32)
    assert info.params == sum(parameter.numel() for parameter in build_model(ModelConfig("plain:8", 5)).parameters())
    assert info.gmacs * 1e9 == 8 * 8 * 8 * 48 + 4 * 4 * 8 * 32 + 8 * 5
    assert main(["info", "plain:8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.variant", "absent:8"], "no family 'absent', expected one of 'convneur', .*'plain'$"),
        (["--model.variant", "plain:8", "--model.fusion", "add"], "model.fusion is 'add', which says nothing to"),
        (
            ["--model.variant", "plain:8", "--model.layer_scale", "0.1", "--model.memory.chunk_length", "16"],
            "model.layer_scale is 0.1, model.memory.chunk_length is 16, which says nothing to model.variant 'plain:8':"
            " leave it out or, where a file sets it, set it back by"
            " --model.layer_scale 1e-06 --model.memory.chunk_length 196 ",
        ),
        (["--model.variant", "plain:8", "--data.image_size", "4"], "data.image_size is 4, expected at least 8"),
        (["--task.name", "poetry"], "task.name is 'poetry', expected one of 'classification'"),
    ],
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_values(load_config(overrides=words))


def test_settings_of_convneur_can_be_set_back(tmp_path: Path) -> None:
    """So that a recipe of ConvNeur's trains a model of another family: the flags are those that the refusal names."""
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {chunk_lengths: [1, 2, 3, 4], fusion: add, mup_base: n1, memory: {inner_lr: 0.5}}")
    with pytest.raises(InputError) as refusal:
        load_config([file], ["--model.variant", "plain:8"])
    back = shlex.split(str(refusal.value).partition("set it back by ")[2].partition(" (")[0])
    assert load_config([file], ["--model.variant", "plain:8", *back]).model == ModelConfig("plain:8")
