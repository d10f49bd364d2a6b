"""What PyTorch does with a model beside running it: transforms, second derivatives, traces, empty batches."""

import io
from typing import get_args

import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from convneur.models.convneur.block import Block
from convneur.models.convneur.branches import GlobalBranch
from convneur.models.convneur.config import WIDTH_RATIOS, MemoryConfig, MixerKind
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.mixers import MIXERS
from convneur.ops.depthwise import weight_gradient
from convneur.ops.memory.reading import ReadOrder

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def block_of(mixer: MixerKind = "neural_memory") -> Block:
    """A block of 8 channels, whose memory of 4 channels is written in two chunks of 20 of 5 x 9 positions."""
    torch.manual_seed(0)
    width = round(8 * WIDTH_RATIOS[mixer])
    branch = GlobalBranch(8, width, MIXERS[mixer](width, MemoryConfig(20)))
    return Block(8, branch, "gate", drop_path=0.0, layer_scale=0.5)


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 8, 5, 9, generator=torch.Generator().manual_seed(1))


def squares(weights: dict[str, torch.Tensor], block: Block, x: torch.Tensor) -> torch.Tensor:
    return functional_call(block, weights, (x,)).square().sum()


def test_gradients_of_every_image_by_itself() -> None:
    block, x = block_of(), images()
    weights = dict(block.named_parameters())
    one_by_one = vmap(grad(squares), in_dims=(None, None, 0))(weights, block, x[:, None])
    whole = grad(squares)(weights, block, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(block(x[i : i + 1]).square().sum(), list(block.parameters()))
        for name, gradient in zip(weights, expected, strict=True):
            torch.testing.assert_close(one_by_one[name][i], gradient, rtol=1e-3, atol=1e-4)
    for name in weights:
        torch.testing.assert_close(whole[name], one_by_one[name].sum(0), rtol=1e-3, atol=1e-4)


def test_directional_derivatives_and_jacobians_agree() -> None:
    block, x = block_of().double(), images(1).double()
    value, tangent = jvp(block, (x,), (x,))
    torch.testing.assert_close(value, block(x))
    backward, forward = jacrev(block)(x), jacfwd(lambda s: block(s * x))(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(tangent, (backward * x).sum((-4, -3, -2, -1)))
    torch.testing.assert_close(forward, tangent)


@pytest.mark.parametrize("read", get_args(ReadOrder))
def test_second_derivatives_of_the_memory(read: ReadOrder) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(2, MemoryConfig(2, read=read)).double()
    qkv = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(memory.recurrence, (qkv,))
    weights = [memory.w1, memory.w2, memory.generator_weight, memory.generator_bias]

    def penalty() -> list[torch.Tensor]:
        loss = memory.recurrence(qkv).square().sum()
        slope = sum(g.square().sum() for g in torch.autograd.grad(loss, [qkv, *weights], create_graph=True))
        return list(torch.autograd.grad(slope, [qkv, *weights]))

    found = penalty()
    memory.implementation = "plain"
    for actual, expected in zip(found, penalty(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_second_derivatives_of_the_depthwise_convolution() -> None:
    x, dy = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(lambda x, dy: weight_gradient(x, dy, 3), (x.requires_grad_(), dy.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda x, dy: weight_gradient(x, dy, 3), (x, dy))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_trace_is_saved_and_has_gradients_for_images_of_any_size(with_gradients: bool) -> None:
    block = block_of()
    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(block, images()[..., :4])  # one chunk, which is read alone
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    x = images(2)
    y, expected = loaded(x), block(x)
    torch.testing.assert_close(y, expected)
    wanted = dict(block.named_parameters())
    found = torch.autograd.grad(y.square().sum(), [p for _, p in loaded.named_parameters()])
    by_name = dict(zip((name for name, _ in loaded.named_parameters()), found, strict=True))
    for name, gradient in zip(wanted, torch.autograd.grad(expected.square().sum(), list(wanted.values())), strict=True):
        torch.testing.assert_close(by_name[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", get_args(MixerKind))
def test_no_images_have_gradients_of_zero(mixer: MixerKind) -> None:
    block, x = block_of(mixer), images(0).requires_grad_()
    y = block(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("implementation", ["plain", "fused", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("read", get_args(ReadOrder))
def test_no_images_in_a_memory(implementation: str, dtype: torch.dtype, read: ReadOrder) -> None:
    memory = NeuralMemory(4, MemoryConfig(6, read=read)).to(dtype)
    memory.implementation = implementation
    tokens = torch.randn(0, 13, 4, dtype=dtype, requires_grad=True)
    memory(tokens).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in memory.parameters())


def test_operators_keep_their_contracts() -> None:
    """The memory's forward operator and the depthwise convolution's are in their own tests."""
    torch.manual_seed(0)
    memory = NeuralMemory(4, MemoryConfig(6))
    qkv = torch.randn(2, 13, 12)
    tensors = qkv, memory.w1, memory.w2, memory.generator_weight, memory.generator_bias
    tensors = tuple(x.detach() for x in tensors)
    y, *kept = torch.ops.convneur.neural_memory(*tensors, 6, 1.0, "before_update", True)
    for kernels in (True, False):
        arguments = (torch.randn_like(y), *tensors, *kept, 6, 1.0, "before_update", kernels)
        torch.library.opcheck(torch.ops.convneur.neural_memory_backward.default, arguments)
    x, gamma, context = torch.randn(2, 12, 8), torch.randn(8), torch.randn(2, 12, 4)
    reduce, expand = [torch.randn(4, 8), torch.randn(4)], [torch.randn(8, 4), torch.randn(8)]
    norm, qkv_layer = [torch.randn(4), torch.randn(4)], [torch.randn(12, 4), torch.randn(12)]
    torch.library.opcheck(torch.ops.convneur.bottleneck.default, (x, [*reduce, *norm, *qkv_layer], 1e-6))
    local = [torch.randn(8, 1, 7, 7), *torch.randn(3, 8), torch.randn(32, 8), torch.randn(32)]
    local += [torch.randn(8, 32), torch.randn(8)]
    for fused in ((None, []), (context, expand)):
        arguments = (x, 4, local, gamma, 1e-6, *fused, True)
        torch.library.opcheck(torch.ops.convneur.block_output.default, arguments)
