"""The model family: sizes and costs against the derivation, any input size, and the gate's equation."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from convneur.branches import MemoryMixer
from convneur.memory import MemoryConfig
from convneur.model import VARIANTS, Block, ConvNeur, GlobalBranch, ModelConfig

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


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match=r"model\.variant is 'm10', expected one of 'n1', "):
        ModelConfig("m10")


def test_variants_are_ordered_by_size() -> None:
    sizes = [size_and_cost(ModelConfig(v))[0] for v in VARIANTS]
    assert sizes == sorted(sizes)
