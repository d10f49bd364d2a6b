"""The table of optimizers, and what an optimizer asks of a model."""

from itertools import product
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from convneur.engine.config import OptimizerConfig
from convneur.engine.methods import METHODS, Implementation
from convneur.engine.optimizer import CONSTRUCTORS, build_optimizer


def test_a_method_is_known_everywhere_or_nowhere() -> None:
    assert get_args(get_type_hints(OptimizerConfig)["name"]) == tuple(METHODS)
    assert set(CONSTRUCTORS) == set(product(METHODS, get_args(Implementation)))


@pytest.mark.parametrize("name", METHODS)
def test_moments_are_as_many_as_an_optimizer_keeps(name: str) -> None:
    weight = nn.Linear(3, 2)
    optimizer = build_optimizer(weight, OptimizerConfig(name=name), "torch", 1, offload=False)
    weight(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state[weight.weight]
    kept = [value for value in state.values() if torch.is_tensor(value) and value.shape == weight.weight.shape]
    assert len(kept) == METHODS[name].moments


class Silent(nn.Sequential):
    """A model that tells nothing of its parameters."""


class Outspoken(nn.Sequential):
    """A model that exempts a matrix."""

    def no_weight_decay(self) -> set[str]:
        return {"0.weight"}


@pytest.mark.parametrize(("kind", "exempt"), [(Silent, 4), (Outspoken, 5)])
def test_any_model_is_stepped(kind: type[nn.Sequential], exempt: int) -> None:
    """Vectors don't decay, whether or not the model names more that doesn't."""
    model = kind(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1), "torch", 1, offload=False)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == 6
    assert sum(decay == 0 for decay in decays.values()) == exempt
    assert decays[id(model[0].weight)] == (0 if kind is Outspoken else 0.1)
