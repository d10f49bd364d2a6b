"""The neural memory against its oracle, and the facts that follow from its equations."""

from typing import get_args

import pytest
import torch
from memory_oracle import reference_memory
from torch.utils.flop_counter import FlopCounterMode

from convneur.memory import MemoryConfig, NeuralMemory, ReadOrder, gelu_and_derivative

READS = get_args(ReadOrder)
CHUNK = 6
# 1, 2 and 5 chunks; ragged last chunks; a sequence shorter than a chunk; a single token.
LENGTHS = [CHUNK, 2 * CHUNK, 5 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK + 5, 3, 1]


def build(read: str, dim: int = 4, chunk_length: int = CHUNK, inner_lr: float = 1.0) -> NeuralMemory:
    """A float64 memory whose every parameter, biases too, is random and large enough to matter."""
    torch.manual_seed(0)
    memory = NeuralMemory(dim, MemoryConfig(chunk_length, inner_lr, read)).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return memory


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("inner_lr", [1.0, 1e-3])
def test_outputs_and_gradients_equal_the_oracle(read: str, length: int, inner_lr: float) -> None:
    memory = build(read, inner_lr=inner_lr)
    tokens = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, length, 4, dtype=torch.float64)
    parameters = dict(memory.named_parameters())

    actual = memory(tokens)
    expected = reference_memory(tokens, parameters, chunk_length=CHUNK, inner_lr=inner_lr, read=read)
    assert relative_error(actual, expected) < 1e-12

    wanted = [tokens, *parameters.values()]
    actual_grads = torch.autograd.grad(actual, wanted, cotangent, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, wanted, cotangent, allow_unused=True)
    for name, a, e in zip(["tokens", *parameters], actual_grads, expected_grads, strict=True):
        a = torch.zeros(1) if a is None else a
        e = torch.zeros(1) if e is None else e
        if e.abs().max() == 0:
            assert a.abs().max() == 0, name
        else:
            assert relative_error(a, e) < 1e-9, name


def test_gelu_derivative_is_the_derivative() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    value, derivative = gelu_and_derivative(x)
    expected = torch.nn.functional.gelu(x)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(derivative, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-12, atol=1e-14)


def test_the_last_update_is_not_made() -> None:
    """With reads before updates, T chunks cost T retrievals and T - 1 updates: 8 and 20 d^2 MACs a token."""
    d, chunks = 8, 3
    memory = build("before_update", dim=d)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        memory.aggregate(*torch.randn(3, 1, chunks * CHUNK, d, dtype=torch.float64))
    retrieval, write, generator = 8 * d * d * CHUNK, 20 * d * d * CHUNK, 3 * d * d
    assert counter.get_total_flops() / 2 == chunks * retrieval + (chunks - 1) * (write + generator)


def test_each_reading_order_sees_what_it_says() -> None:
    """Which tokens an output depends on, read off the Jacobian."""
    length = 3 * CHUNK
    chunk = torch.arange(length) // CHUNK
    own = torch.eye(length, dtype=torch.bool)
    sees = {
        "before_update": own | (chunk[None, :] < chunk[:, None]),
        "after_update": chunk[None, :] <= chunk[:, None],
        "final_state": torch.ones(length, length, dtype=torch.bool),
    }
    for read, expected in sees.items():
        memory = build(read)
        tokens = torch.randn(1, length, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x, m=memory: m(x).sum(-1), tokens)
        assert torch.equal(jacobian[0, :, 0].abs().sum(-1) > 0, expected), read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_and_inner_gradient_stay_in_float32_under_autocast(dtype: torch.dtype) -> None:
    """Every matmul and every elementwise step inside the loop sees float32 operands only."""
    memory = NeuralMemory(8, MemoryConfig(CHUNK))
    seen: set[torch.dtype] = set()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    qkv = torch.randn(3, 2, 3 * CHUNK, 8)
    aggregate = memory.aggregate

    def recorded(q, k, v):
        with Recorder():
            return aggregate(q, k, v)

    memory.aggregate = recorded
    with torch.autocast("cpu", dtype):
        output = memory(qkv[0])
    assert seen == {torch.float32}
    assert output.dtype == torch.float32


@pytest.mark.parametrize("read", READS)
def test_stays_bounded_over_hundreds_of_chunks(read: str) -> None:
    """256 x 256 positions, as stage 1 has for a 1024 x 1024 image: 335 chunks of 196."""
    torch.manual_seed(0)
    memory = NeuralMemory(8, MemoryConfig(read=read))
    with torch.no_grad():
        output = memory(torch.randn(1, 256 * 256, 8))
    assert output.isfinite().all()
    assert output.abs().max() < 100


def test_bad_chunk_length() -> None:
    with pytest.raises(ValueError, match="chunk_length must be at least 1, got 0"):
        NeuralMemory(4, MemoryConfig(chunk_length=0))
