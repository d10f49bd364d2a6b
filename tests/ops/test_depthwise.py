"""The depthwise convolution against torch's own, in float64."""

import pytest
import torch

from convneur.models.layers import DepthwiseConv2d
from convneur.ops.depthwise import weight_gradient

SIZES = [(1, 1), (2, 9), (7, 7), (33, 17)]


def gradients(conv: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input, the weights and the bias."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = conv(x)
    return [y, *torch.autograd.grad(y, [x, *conv.parameters()], dy)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [5, 16])
def test_equals_torchs_own(channels: int, size: tuple[int, int], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv2d(channels, taps=7)
    x, dy = (torch.randn(3, channels, *size).to(memory_format=layout) for _ in range(2))
    plain = torch.nn.Conv2d(channels, channels, 7, padding=3, groups=channels).double()
    plain.load_state_dict(conv.state_dict())
    for actual, expected in zip(gradients(conv, x, dy), gradients(plain, x.double(), dy.double()), strict=True):
        assert actual.shape == expected.shape
        assert ((actual - expected).norm() / expected.norm()).item() < 1e-6


def test_a_frozen_input_needs_no_gradient() -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv2d(8, taps=7)
    x = torch.randn(2, 8, 6, 6)
    conv(x).square().sum().backward()
    with_input = gradients(conv, x, 2 * conv(x).detach())
    assert torch.equal(conv.weight.grad, with_input[2])


def test_operator_keeps_its_contract() -> None:
    x, dy = torch.randn(2, 2, 4, 6, 5)
    torch.library.opcheck(torch.ops.convneur.depthwise_weight_gradient.default, (x, dy, 3))
    assert weight_gradient(x, dy, 3).shape == (4, 1, 3, 3)


def test_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv2d(8, taps=7)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(2, 2, 8, 6, 5)
    for actual, expected in zip(gradients(compiled, x, dy), gradients(conv, x, dy), strict=True):
        torch.testing.assert_close(actual, expected)
