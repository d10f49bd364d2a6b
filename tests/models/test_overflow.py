"""Memories whose states grow without end are named, before training and where its gradients aren't finite."""

import pytest
import torch

from convneur.data.errors import InputError
from convneur.models.convneur.config import MemoryConfig, MixerKind, ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.models.convneur.overflow import check_memories, overflowing_memory


@pytest.mark.parametrize("branch", ["neural_memory", "titans"])
def test_steps_that_are_too_large_are_refused(branch: MixerKind) -> None:
    model = ConvNeur(ModelConfig("n1", branch=branch, memory=MemoryConfig(4, inner_lr=1e6, read="after_update")))
    with pytest.raises(InputError) as error:
        check_memories(model, 64)
    message = str(error.value)
    assert "stages.0.blocks.0.global_branch.mixer" in message
    assert "chunk_length 4, inner_lr 1e+06" in message
    assert "set model.memory.inner_lr lower" in message
    assert "\n" not in message


def test_looking_leaves_everything_as_it_was() -> None:
    model = ConvNeur(ModelConfig("n1", drop_path=0.5))
    before = torch.get_rng_state()
    assert overflowing_memory(model, 64) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_only_the_memory_where_it_begins_is_named() -> None:
    """What comes behind is given what isn't finite, and so is a memory whose model is spoiled before it."""
    model = ConvNeur(ModelConfig("n1", chunk_lengths=(8, 8, 8, 2), memory=MemoryConfig(read="final_state")))
    with torch.no_grad():
        model.stages[3].blocks[0].global_branch.mixer.memory.w2.fill_(1e30)
    assert (named := overflowing_memory(model, 64)) is not None
    assert "stages.3.blocks.0" in named
    with torch.no_grad():
        model.stem[0].bias.fill_(torch.nan)
    assert overflowing_memory(model, 64) is None
