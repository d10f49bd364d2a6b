"""Persistent buffers: in two ranks, stopped and resumed; and what becomes of each kind by itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from places import RANKS
from torch import nn

from convneur.data.errors import InputError
from convneur.engine.buffers import Buffers
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.system.world import World

FILES = {"buffers.safetensors", "ema-buffers.safetensors"}
LEARNED = ["conv.bias", "conv.weight", "head.bias", "head.weight", "norm.bias"]
CHANGED = [*LEARNED, "norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "norm.weight"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("buffers")


@pytest.fixture(scope="module")
def told(out: Path) -> dict[int, list[dict[str, Any]]]:
    """By ZeRO stage, what each rank found."""
    said = run_ranks(RANKS / "buffers.py", out)
    records = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {record["stage"]: record["ranks"] for record in records}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_run_with_buffers_resumes_to_the_bit(told: dict[int, list[dict[str, Any]]], out: Path, stage: int) -> None:
    """Weights, moments, buffers, the averages of all of them, and the scores of raw and averaged weights."""
    for rank in told[stage]:
        assert rank["resumed"] == rank["saved"] == []
        assert rank["scores"] == [True] * 4
        assert rank["scores differ"]
    names = {path.name for path in (out / f"zero{stage}" / "step-00000006").iterdir()}
    assert names >= FILES
    manifest = json.loads((out / f"zero{stage}" / "step-00000006" / "manifest.json").read_text())
    assert manifest.keys() >= FILES


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_ranks_hold_the_mean_of_their_statistics(told: dict[int, list[dict[str, Any]]], stage: int) -> None:
    for rank in told[stage]:
        assert rank["error"] < 1e-6
        assert rank["ranks"] == ["passes"]  # which isn't persistent, and counts something else on every rank


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_skipped_step_leaves_buffers_alone(told: dict[int, list[dict[str, Any]]], stage: int) -> None:
    for rank in told[stage]:
        assert rank["skipped"] == [True, []]
        assert rank["after"] == CHANGED


class Odd(nn.Module):
    """A module with the same submodule under two names, and buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.tied = nn.BatchNorm1d(3)
        self.register_buffer("narrow", torch.arange(3.0).bfloat16())
        self.register_buffer("own", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)


def test_what_is_named_is_what_a_state_dict_holds(world: World) -> None:
    model = Odd()
    buffers, parameters = Buffers(model), dict(model.named_parameters(remove_duplicate=False))
    assert buffers.named().keys() == model.state_dict().keys() - parameters.keys()
    assert len(buffers) == 7
    assert buffers.named()["narrow"].dtype == torch.float32  # a master, as weights have
    for name, value in buffers.named().items():
        assert torch.equal(value, model.state_dict()[name].to(value.dtype))


@pytest.mark.parametrize("skipped", [False, True, torch.tensor(0.0), torch.tensor(1.0)])
def test_steps_are_taken_in_or_undone(world: World, skipped: torch.Tensor | bool) -> None:
    model = Odd()
    buffers = Buffers(model)
    before = buffers.named()
    model.norm(torch.randn(5, 3))
    model.narrow.add_(1)
    changed = buffers.named()
    buffers.settle(skipped)
    for name, value in buffers.named().items():
        assert torch.equal(value, (before if skipped else changed)[name])
    assert not torch.equal(before["norm.running_mean"], changed["norm.running_mean"])


def test_values_are_loaded_by_name(world: World) -> None:
    model, other = Odd(), Odd()
    model.norm(torch.randn(5, 3))
    buffers = Buffers(other)
    buffers.load(model.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"another model: buffer norm\.running_mean is missing or misshapen"):
        buffers.load({**model.state_dict(), "norm.running_mean": torch.zeros(4)})
    with pytest.raises(InputError, match="another model: buffer narrow is missing or misshapen"):
        buffers.load({name: value for name, value in model.state_dict().items() if name != "narrow"})


def test_convneur_has_none() -> None:
    assert len(Buffers(ConvNeur(ModelConfig("n1", num_classes=10)))) == 0
