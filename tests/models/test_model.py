"""The model family: sizes and costs against the derivation, any input size, and the gate's equation."""

import re
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from convneur.models.convneur.block import Block
from convneur.models.convneur.branches import GlobalBranch
from convneur.models.convneur.config import VARIANTS, MemoryConfig, ModelConfig
from convneur.models.convneur.mixers import MemoryMixer
from convneur.models.convneur.model import ConvNeur

# Parameters in M and GMACs at 224 x 224: what the paper prints (two digits), and what the derivation gives.
PAPER = {"m1": (4.3, 0.71), "m2": (6.1, 1.0), "m3": (10.6, 1.8), "m4": (18.1, 3.06)}
DERIVED = {
    "m1": (4.311, 0.660),
    "m2": (6.103, 0.942),
    "m3": (10.618, 1.655),
    "m4": (18.048, 2.896),
    "m5": (32.12, 5.104),
    "m6": (53.76, 9.332),
    "m7": (94.87, 16.508),
    "m8": (211.88, 36.956),
    "m9": (375.29, 65.534),
}


def size_and_cost(config: ModelConfig) -> tuple[float, float]:
    """Parameters in M and GMACs of one 224 x 224 image, without allocating either."""
    with FakeTensorMode():
        model = ConvNeur(config)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


@pytest.mark.parametrize("variant", PAPER)
def test_totals_of_the_paper(variant: str) -> None:
    params, gmacs = size_and_cost(ModelConfig(variant))
    assert params == pytest.approx(PAPER[variant][0], rel=0.005)
    assert gmacs <= PAPER[variant][1]


@pytest.mark.parametrize("variant", DERIVED)
def test_totals_of_the_derivation(variant: str) -> None:
    params, gmacs = size_and_cost(ModelConfig(variant))
    assert params == pytest.approx(DERIVED[variant][0], rel=1e-3)
    assert gmacs == pytest.approx(DERIVED[variant][1], rel=1e-3)


@pytest.mark.parametrize(("placement", "params", "gmacs"), [("none", 9.046, 1.367), ("per_layer", 13.375, 2.111)])
def test_totals_of_the_placement_ablation(placement: str, params: float, gmacs: float) -> None:
    assert size_and_cost(ModelConfig("m3", placement=placement)) == pytest.approx((params, gmacs), rel=2e-3)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 224), (129, 95)])
@pytest.mark.parametrize("read", ["before_update", "after_update", "final_state"])
def test_any_input_size(size: tuple[int, int], read: str) -> None:
    model = ConvNeur(ModelConfig("n1", num_classes=7, memory=MemoryConfig(chunk_length=10, read=read)))
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_block_is_the_equation_of_the_paper() -> None:
    """F_out = X + sigmoid(G) * F_loc."""
    torch.manual_seed(0)
    branch = GlobalBranch(8, 4, MemoryMixer(4, MemoryConfig(chunk_length=5)))
    block = Block(8, branch, "gate", drop_path=0.0, layer_scale=1.0).eval()
    x = torch.randn(2, 8, 6, 7)
    gate = block.global_branch(x.permute(0, 2, 3, 1)).sigmoid().permute(0, 3, 1, 2)
    local = block.local_branch(x).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), x + gate * local)


def test_channels_last_images_give_the_same_logits() -> None:
    torch.manual_seed(0)
    model = ConvNeur(ModelConfig("n1", num_classes=5, layer_scale=1.0)).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))


def test_local_only_control_has_no_memory() -> None:
    model = ConvNeur(ModelConfig("n1", placement="none"))
    assert not [name for name, _ in model.named_parameters() if "global_branch" in name]


@pytest.mark.parametrize(("fusion", "extra"), [("gate", 0), ("add", 0), ("concat", 2 * 8 * 8 + 8)])
def test_fusion(fusion: str, extra: int) -> None:
    torch.manual_seed(0)
    branch = GlobalBranch(8, 4, MemoryMixer(4, MemoryConfig(chunk_length=5)))
    block = Block(8, branch, fusion, drop_path=0.0, layer_scale=0.5).eval()
    x = torch.randn(2, 8, 6, 7)
    context, local = branch(x.permute(0, 2, 3, 1)), block.local_branch(x)
    match fusion:
        case "gate":
            fused = local / (1 + (-context).exp())
        case "add":
            fused = local + context
        case "concat":
            weight = block.project.weight
            fused = local @ weight[:, :8].T + context @ weight[:, 8:].T + block.project.bias
    torch.testing.assert_close(block(x), x + 0.5 * fused.permute(0, 3, 1, 2))
    assert sum(p.numel() for p in block.project.parameters()) == extra


def test_stages_may_differ() -> None:
    config = ModelConfig(
        "n1",
        memory=MemoryConfig(chunk_length=99, inner_lr=0.5, read="final_state"),
        chunk_lengths=(7, 8, 9, 10),
        inner_lrs=(1.0, 0.1, 0.01, 0.001),
        branch_widths=(16, 12, 20, 8),
    )
    model = ConvNeur(config)
    memories = [stage.blocks[0].global_branch.mixer.memory for stage in model.stages]
    assert [memory.config.chunk_length for memory in memories] == [7, 8, 9, 10]
    assert [memory.config.inner_lr for memory in memories] == [1.0, 0.1, 0.01, 0.001]
    assert {memory.config.read for memory in memories} == {"final_state"}
    assert [memory.dim for memory in memories] == [16, 12, 20, 8]
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "m10"}, "model.variant is 'm10', expected one of 'n1', "),
        ({"placement": "first"}, "model.placement is 'first', expected one of 'none', 'per_stage', 'per_layer'"),
        ({"branch": "mamba"}, "model.branch is 'mamba', expected one of 'neural_memory', 'cbam', "),
        ({"fusion": "mul"}, "model.fusion is 'mul', expected one of 'gate', 'add', 'concat'"),
        ({"global_pool": "gem"}, "model.global_pool is 'gem', expected one of 'avg', 'max', 'avgmax', ''"),
        ({"num_classes": -1}, "model.num_classes is -1, expected at least 0"),
        ({"in_chans": 0}, "model.in_chans is 0, expected at least 1"),
        ({"drop_path": 1.0}, "model.drop_path is 1.0, expected a rate in [0, 1)"),
        ({"drop_rate": float("nan")}, "model.drop_rate is nan, expected a rate in [0, 1)"),
        ({"memory": MemoryConfig(chunk_length=0)}, "model.memory.chunk_length is 0, expected at least 1"),
        ({"memory": MemoryConfig(inner_lr=-0.1)}, "model.memory.inner_lr is -0.1, expected at least 0"),
        ({"memory": MemoryConfig(read="after")}, "model.memory.read is 'after', expected one of 'before_update', "),
        ({"chunk_lengths": (1, 2, 3)}, "model.chunk_lengths is [1, 2, 3], expected four numbers above 0, one a stage"),
        ({"inner_lrs": (1, 1, 0, 1)}, "model.inner_lrs is [1, 1, 0, 1], expected four numbers above 0, one a stage"),
        ({"branch_widths": (8, 8, -8, 8)}, "model.branch_widths is [8, 8, -8, 8], expected four numbers above 0"),
    ],
)
def test_settings_that_make_no_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**settings)


def test_variants_are_ordered_by_size() -> None:
    sizes = [size_and_cost(ModelConfig(v))[0] for v in VARIANTS]
    assert sizes == sorted(sizes)
