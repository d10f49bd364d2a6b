"""Blocks in the C++ kernels: their rounding, their bits, and the modules and passes that they leave to PyTorch."""

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from convneur.data.compiled import compiler
from convneur.models.convneur.block import Block
from convneur.models.convneur.branches import GlobalBranch, LocalBranch
from convneur.models.convneur.config import WIDTH_RATIOS, Fusion, MemoryConfig, MixerKind
from convneur.models.convneur.mixers import MIXERS
from convneur.models.layers import ChannelLinear, DepthwiseConv2d

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="there is no C++ compiler"),
]
BLOCK, BOTTLENECK = torch.ops.convneur.block_output, torch.ops.convneur.bottleneck


def block_of(
    dim: int,
    mixer: MixerKind | None = "neural_memory",
    fusion: Fusion = "gate",
    chunk_length: int = 20,
    drop_path: float = 0.0,
) -> Block:
    """Every layer of it has something to say."""
    torch.manual_seed(0)
    branch = None
    if mixer is not None:
        width = round(dim * WIDTH_RATIOS[mixer])
        branch = GlobalBranch(dim, width, MIXERS[mixer](width, MemoryConfig(chunk_length)))
    block = Block(dim, branch, fusion, drop_path, layer_scale=0.5)
    for parameter in block.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


class Operations(TorchDispatchMode):
    """Counts floating-point operations by operator; without hooks for all modules, as FlopCounterMode has them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.counts[func.overloadpacket] += formula(*args, **(kwargs or {}), out_val=out)
        return out


def calls(block: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, dict[Any, int]]:
    """Its output, and the operations that did the arithmetic with their floating-point operations."""
    with Operations() as operations:
        y = block(x)
    return y, dict(operations.counts)


def assert_as_exact_as_pytorch(block: Block, x: torch.Tensor) -> dict[Any, int]:
    with_pytorch, expected_counts = calls(block, x)
    with torch.no_grad():
        y, counts = calls(block, x)
    assert [BLOCK in each for each in (counts, expected_counts)] == [True, False]
    assert sum(counts.values()) == sum(expected_counts.values())
    exact = copy.deepcopy(block).double()(x.double())
    ours, theirs = ((a - exact).norm() / exact.norm() for a in (y, with_pytorch))
    assert ours < max(2 * theirs, 1e-6)
    return counts


# Channels: fewer than a vector, no whole vectors, whole ones, hidden channels of several panels
@pytest.mark.parametrize("dim", [2, 4, 12, 16, 40, 72])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (3, 9, 7), (2, 4, 19)])
@pytest.mark.parametrize("mixer", [None, "neural_memory"])
def test_float32_is_as_exact_as_with_pytorch(dim: int, shape: tuple[int, int, int], mixer: MixerKind | None) -> None:
    images, height, width = shape
    counts = assert_as_exact_as_pytorch(block_of(dim, mixer), torch.randn(images, dim, height, width))
    assert (BOTTLENECK in counts) == (mixer is not None)


@pytest.mark.parametrize("fusion", ["gate", "add", "concat"])
@pytest.mark.parametrize("chunk_length", [7, 63])  # the memory is written, or only read
def test_every_fusion_of_a_memory(fusion: Fusion, chunk_length: int) -> None:
    counts = assert_as_exact_as_pytorch(block_of(24, "neural_memory", fusion, chunk_length), torch.randn(2, 24, 9, 7))
    assert (torch.ops.convneur.neural_memory in counts) == (chunk_length == 7)


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"neural_memory"}))
def test_every_other_branch(mixer: MixerKind) -> None:
    counts = assert_as_exact_as_pytorch(block_of(32, mixer), torch.randn(2, 32, 9, 7))
    assert (BOTTLENECK in counts) == (WIDTH_RATIOS[mixer] < 1)


@torch.no_grad()
def test_an_image_has_the_same_bits_in_any_batch_and_with_any_threads() -> None:
    block = block_of(40)
    x = torch.randn(4, 40, 11, 13)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = block(x)
        torch.set_num_threads(3)
        assert torch.equal(block(x), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(block(x[2:3]), whole[2:3])


def replace(block: Block, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, module)


# A module that the kernels pass over, and one of another kind in its place
OTHERS: list[tuple[str, nn.Module]] = [
    ("drop_path", nn.Dropout(0.0)),
    ("local_branch", type("OfTheirs", (LocalBranch,), {})(8)),
    ("local_branch.dwconv", nn.Conv2d(8, 8, 7, padding=3, groups=8)),
    ("local_branch.dwconv", DepthwiseConv2d(8, taps=5)),
    ("local_branch.norm", nn.RMSNorm(8)),
    ("local_branch.norm", nn.LayerNorm(8, elementwise_affine=False)),
    ("local_branch.norm", nn.LayerNorm(8, bias=False)),
    ("local_branch.norm", nn.LayerNorm((4, 8))),
    ("local_branch.up", nn.Linear(8, 32)),
    ("local_branch.up", ChannelLinear(8, 32, bias=False)),
    ("local_branch.act", nn.ReLU()),
    ("local_branch.act", nn.GELU("tanh")),
    ("local_branch.down", nn.Linear(32, 8)),
    ("global_branch.expand", nn.Linear(4, 8)),
    ("global_branch.expand", ChannelLinear(4, 8, bias=False)),
    ("project", ChannelLinear(8, 8)),
]
PASSED_OVER = [*dict.fromkeys(name for name, _ in OTHERS), "global_branch"]


@pytest.mark.parametrize("name", PASSED_OVER)
@torch.no_grad()
def test_calls_a_module_with_a_hook(name: str) -> None:
    block, x = block_of(8), torch.randn(1, 8, 4, 4)
    y, counts = calls(block, x)
    assert BLOCK in counts
    seen: list[nn.Module] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(block.get_submodule(name), register)(lambda module, *_: seen.append(module))
        again, counts = calls(block, x)
        assert BLOCK not in counts
        torch.testing.assert_close(again, y)
        handle.remove()
    assert len(seen) == (0 if name == "project" else 2)  # which a gate has no use for


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
@torch.no_grad()
def test_calls_every_module_where_all_have_a_hook(register: Callable[..., Any]) -> None:
    block, x = block_of(8), torch.randn(1, 8, 4, 4)
    seen: set[nn.Module] = set()
    handle = register(lambda module, *_: seen.add(module))
    try:
        assert BLOCK not in calls(block, x)[1]
    finally:
        handle.remove()
    assert seen == set(block.modules()) - {block.project}  # which a gate has no use for
    assert BLOCK in calls(block, x)[1]


@pytest.mark.parametrize("name", ["reduce", "norm", "mixer", "mixer.memory"])
def test_calls_a_module_with_a_hook_of_the_bottleneck(name: str) -> None:
    block, x = block_of(8), torch.randn(1, 8, 4, 4)
    seen: list[torch.Size] = []
    block.get_submodule(f"global_branch.{name}").register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape)
    )
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("name", "module"), OTHERS)
@torch.no_grad()
def test_leaves_a_module_of_another_kind_to_pytorch(name: str, module: nn.Module) -> None:
    block, x = block_of(8), torch.randn(1, 8, 4, 4)
    replace(block, name, module)
    _, counts = calls(block, x)
    assert BLOCK not in counts


@pytest.mark.parametrize("name", ["local_branch.up", "local_branch.act", "global_branch.expand", "global_branch.norm"])
def test_calls_a_forward_that_was_put_in_the_place_of_ours(name: str) -> None:
    block, x = block_of(8), torch.randn(1, 8, 4, 4)
    module = block.get_submodule(name)
    ours = module.forward
    module.forward = lambda input: 2 * ours(input)  # type: ignore[method-assign]
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_wrong_channels_are_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 9 channels"):
        block_of(8)(torch.randn(1, 9, 4, 4))


@torch.no_grad()
def test_a_memory_of_another_width_is_pytorchs_error() -> None:
    block = block_of(8)
    replace(block, "global_branch.mixer", MIXERS["neural_memory"](6, MemoryConfig(20)))
    with pytest.raises(RuntimeError, match="to have 6 channels, but got 4 channels"):
        block(torch.randn(1, 8, 4, 4))


@torch.no_grad()
@pytest.mark.parametrize("mixer", [None, "neural_memory", "cbam"])
def test_maps_over_batches(mixer: MixerKind | None) -> None:
    block, x = block_of(8, mixer), torch.randn(3, 2, 8, 4, 4)
    torch.testing.assert_close(torch.func.vmap(block)(x), torch.stack([block(one) for one in x]))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_keeps_forward_derivatives() -> None:
    block, x, direction = block_of(8, "cbam"), torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = block(torch.autograd.forward_ad.make_dual(x, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    block, x, direction = block.double(), x.double(), 1e-5 * direction.double()
    torch.testing.assert_close(
        tangent.double(), (block(x + direction) - block(x - direction)) / 2e-5, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*", "ignore::torch.jit.TracerWarning")
def test_a_trace_takes_images_of_other_sizes() -> None:
    block = block_of(8, "cbam")
    traced = torch.jit.trace(block, torch.randn(2, 8, 5, 6), check_trace=False)
    x = torch.randn(1, 8, 9, 7)
    torch.testing.assert_close(traced(x), block(x))


@torch.no_grad()
def test_leaves_weights_of_another_kind_to_pytorch() -> None:
    block, x = block_of(8), torch.randn(1, 8, 4, 4)
    weights = {"local_branch.up.weight": torch.zeros(32, 8), "local_branch.up.bias": torch.zeros(32)}
    assert BLOCK not in calls(lambda x: torch.func.functional_call(block, weights, (x,)), x)[1]


@torch.no_grad()
def test_leaves_other_passes_to_pytorch() -> None:
    x = torch.randn(1, 8, 4, 4)
    dropping = block_of(8, drop_path=0.5)
    assert BLOCK not in calls(dropping, x)[1]
    assert BLOCK in calls(dropping.eval(), x)[1]
    dropping.drop_path.train()
    assert BLOCK not in calls(dropping, x)[1]
    assert BLOCK not in calls(block_of(8), x.as_subclass(type("Theirs", (torch.Tensor,), {})))[1]
    assert BLOCK not in calls(block_of(8).double(), x.double())[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert BLOCK not in calls(block_of(8), x)[1]


@torch.no_grad()
def test_says_which_weights_are_not_like_the_input() -> None:
    block = block_of(8)
    block.local_branch.down.double()
    with pytest.raises(TypeError, match=r"expected float32 on the CPU like the input, got torch\.float64 on cpu"):
        block(torch.randn(1, 8, 4, 4))


@torch.no_grad()
@torch._inductor.config.patch(force_disable_caches=True)  # or nothing may be compiled
@pytest.mark.parametrize("mixer", [None, "neural_memory", "cbam"])
def test_compiles_without_graph_breaks(mixer: MixerKind | None) -> None:
    block = block_of(16, mixer)
    called: set[object] = set()

    def compile_graph(graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        called.update(node.target for node in graph.graph.nodes)
        return compile_fx_inner(graph, *args, **kwargs)

    backend = partial(compile_fx, inner_compile=compile_graph)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for size in (4, 5, 9):  # the memory is only read in the first
        x = torch.randn(2, 16, size, size + 1)
        torch.testing.assert_close(compiled(x), block(x))
    assert (BLOCK.default in called) != torch.__version__.startswith("2.11.")  # which calls every compilation an export


@torch.no_grad()
@pytest.mark.parametrize("mixer", [None, "neural_memory", "cbam"])
def test_no_images(mixer: MixerKind | None) -> None:
    assert block_of(8, mixer)(torch.randn(0, 8, 4, 5)).shape == (0, 8, 4, 5)


def test_queries_of_zero_read_what_is_there() -> None:
    block, x = block_of(8), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        for parameter in (block.global_branch.mixer.memory.qkv_weight, block.global_branch.mixer.memory.qkv_bias):  # type: ignore[union-attr]
            parameter.zero_()
    assert_as_exact_as_pytorch(block, x)


@torch.no_grad()
def test_a_gate_opens_and_closes_without_overflow() -> None:
    block, x = block_of(8), torch.randn(2, 8, 4, 4)
    block.global_branch.expand.weight.zero_()  # type: ignore[union-attr]
    block.global_branch.expand.bias.copy_(torch.tensor([-torch.inf, -1e4, -90.0, -1.0, 1.0, 90.0, 1e4, torch.inf]))  # type: ignore[union-attr]
    local = block.local_branch(x)
    gates = torch.tensor([0, 0, 0, torch.tensor(-1.0).sigmoid(), torch.tensor(1.0).sigmoid(), 1, 1, 1])
    torch.testing.assert_close(block(x), x + (block.gamma * gates * local).permute(0, 3, 1, 2))


@torch.no_grad()
def test_nan_is_not_lost() -> None:
    block, x = block_of(8), torch.randn(2, 8, 4, 5)
    x[1, 3, 2, 2] = torch.nan
    y = block(x)
    assert y[1].isnan().all()
    assert not y[0].isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF])
def test_no_nan_of_a_gate_is_lost(bits: int) -> None:
    block = block_of(8)
    block.global_branch.expand.bias[2] = torch.tensor([bits]).to(torch.uint32).view(torch.float32)[0]  # type: ignore[union-attr]
    nan = block(torch.randn(2, 8, 4, 5)).isnan()
    assert nan[:, 2].all()
    assert nan.sum() == 2 * 4 * 5
