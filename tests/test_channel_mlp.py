"""The MLP over channels in one go: its rounding, its bits, and the modules and passes that it leaves to PyTorch."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convneur import native
from convneur.channel_mlp import GELU, LARGEST_DIM, channel_mlp
from convneur.linear import ChannelLinear
from convneur.model import LocalBranch

pytestmark = pytest.mark.skipif(shutil.which(native.compiler()[0]) is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """Fills what torch.empty returns with NaN, so that no result can depend on it unseen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def modules(dim: int, hidden: int) -> tuple[ChannelLinear, GELU, ChannelLinear]:
    torch.manual_seed(0)
    made = ChannelLinear(dim, hidden), GELU(), ChannelLinear(hidden, dim)
    for module in made:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.4)
    return made


def by_kernel(x: torch.Tensor, *mlp: nn.Module) -> torch.Tensor:
    """Its output, after seeing that the kernel, and nothing else, computed it."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = channel_mlp(x, *mlp)
    macs = x[..., 0].numel() * 2 * mlp[0].weight.numel()  # type: ignore[operator,union-attr]
    assert counter.get_flop_counts()["Global"] == {torch.ops.convneur.channel_mlp: 2 * macs}
    return y


# hidden: less than a vector, more than a panel, a multiple of 1,024 bytes
@pytest.mark.parametrize(("dim", "hidden"), [(1, 1), (3, 12), (16, 64), (20, 403), (40, 160), (64, 256), (128, 512)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 7)])
def test_float32_is_as_exact_as_with_pytorch(dim: int, hidden: int, shape: tuple[int, int, int]) -> None:
    up, act, down = modules(dim, hidden)
    x = torch.randn(*shape, dim)
    y, with_pytorch = by_kernel(x, up, act, down), down(act(up(x)))
    exact = down.double()(act(up.double()(x.double())))
    ours, theirs = ((a - exact).norm() / exact.norm() for a in (y, with_pytorch))
    assert ours < max(2 * theirs, 1e-6)


def test_a_position_has_the_same_bits_in_any_batch_and_with_any_threads() -> None:
    mlp = modules(40, 160)
    x = torch.randn(4, 11, 13, 40)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = by_kernel(x, *mlp)
        torch.set_num_threads(3)
        assert torch.equal(by_kernel(x, *mlp), whole)
    finally:
        torch.set_num_threads(threads)
    for part in (x[2:3], x[:, 3:5, 2:]):
        expected = whole[2:3] if part.shape[1] == 11 else whole[:, 3:5, 2:]
        assert torch.equal(by_kernel(part, *mlp), expected)


def test_a_branch_uses_it_without_gradients_only() -> None:
    branch = LocalBranch(8)
    x = torch.randn(2, 8, 6, 5)
    with FlopCounterMode(display=False) as kept:
        expected = branch(x)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        y = branch(x)
    torch.testing.assert_close(y, expected)
    counts = counter.get_flop_counts()["Global"], kept.get_flop_counts()["Global"]
    assert [torch.ops.convneur.channel_mlp in count for count in counts] == [True, False]
    assert sum(counts[0].values()) == sum(counts[1].values())


def counts_calls(branch: LocalBranch, x: torch.Tensor) -> int:
    seen: list[nn.Module] = []
    handle = branch.up.register_forward_hook(lambda module, *_: seen.append(module))
    branch(x)
    handle.remove()
    return len(seen)


@torch.no_grad()
def test_leaves_to_pytorch_what_it_cannot_do() -> None:
    x = torch.randn(1, 8, 4, 4)
    branch = LocalBranch(8)
    assert counts_calls(branch, x) == 1  # hooks are called, those of ZeRO stage 3 among them
    branch.up = nn.Linear(8, 32)  # a module of another kind
    for module, image, autocast in (
        (branch, x, False),
        (LocalBranch(8).double(), x.double(), False),
        (LocalBranch(LARGEST_DIM + 8), torch.randn(1, LARGEST_DIM + 8, 4, 4), False),
        (LocalBranch(8), x, True),
    ):
        with torch.autocast("cpu", torch.bfloat16, autocast), FlopCounterMode(display=False) as counter:
            module(image)
        assert torch.ops.convneur.channel_mlp not in counter.get_flop_counts()["Global"]


@torch.no_grad()
def test_compiles_without_graph_breaks() -> None:
    branch = LocalBranch(16)
    compiled = torch.compile(branch, fullgraph=True, dynamic=True)
    for size in (5, 9):
        x = torch.randn(2, 16, size, size + 1)
        torch.testing.assert_close(compiled(x), branch(x))


def test_nan_is_not_lost() -> None:
    up, act, down = modules(8, 32)
    x = torch.randn(3, 1, 2, 8)
    x[1, 0, 1, 3] = torch.nan
    y = by_kernel(x, up, act, down)
    assert y[1, 0, 1].isnan().all()
    assert y.isnan().sum() == 8
