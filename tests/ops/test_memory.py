"""The neural memory against its oracle, and the facts that follow from its equations."""

from typing import get_args

import pytest
import torch
from memory_oracle import reference_memory
from torch.utils.flop_counter import FlopCounterMode

from convneur.models.convneur.config import MemoryConfig
from convneur.models.convneur.memory import NeuralMemory
from convneur.ops.memory import eager
from convneur.ops.memory.equations import gelu_and_derivative
from convneur.ops.memory.reading import ReadOrder

pytestmark = pytest.mark.usefixtures("poisoned_memory")

READS = get_args(ReadOrder)
IMPLEMENTATIONS = ["plain", "fused", "auto"]
CHUNK = 6
# 1, 2 and 5 chunks; ragged last chunks; a sequence shorter than a chunk; a single token.
LENGTHS = [CHUNK, 2 * CHUNK, 5 * CHUNK, 2 * CHUNK + 1, 4 * CHUNK + 5, 3, 1]


def build(read: str, implementation: str, dim: int = 4, inner_lr: float = 1.0) -> NeuralMemory:
    """A float64 memory whose every parameter, biases too, is random and large enough to matter."""
    torch.manual_seed(0)
    memory = NeuralMemory(dim, MemoryConfig(CHUNK, inner_lr, read)).double()
    memory.implementation = implementation
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return memory


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("inner_lr", [1.0, 1e-3])
def test_outputs_and_gradients_equal_the_oracle(implementation: str, read: str, length: int, inner_lr: float) -> None:
    compare_with_oracle(implementation, read, length, inner_lr, dim=4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("dim", [1, 3])
def test_widths_that_no_kernel_is_made_for(implementation: str, read: str, dim: int) -> None:
    compare_with_oracle(implementation, read, 2 * CHUNK + 1, 1.0, dim)


def compare_with_oracle(implementation: str, read: str, length: int, inner_lr: float, dim: int) -> None:
    memory = build(read, implementation, dim, inner_lr)
    tokens = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, length, dim, dtype=torch.float64)
    parameters = dict(memory.named_parameters())

    actual = memory(tokens)
    expected = reference_memory(tokens, parameters, chunk_length=CHUNK, inner_lr=inner_lr, read=read)
    assert relative_error(actual, expected) < 1e-12

    wanted = [tokens, *parameters.values()]
    actual_grads = torch.autograd.grad(actual, wanted, cotangent, allow_unused=implementation == "plain")
    expected_grads = torch.autograd.grad(expected, wanted, cotangent, allow_unused=True)
    for name, a, e in zip(["tokens", *parameters], actual_grads, expected_grads, strict=True):
        a = torch.zeros(1) if a is None else a
        e = torch.zeros(1) if e is None else e
        if e.abs().max() == 0:
            assert a.abs().max() == 0, name
        else:
            assert relative_error(a, e) < 1e-9, name


@pytest.mark.parametrize("length", [1, CHUNK])
def test_keys_and_values_that_nothing_reads_have_no_gradient(length: int) -> None:
    """As an exported or scripted graph calls the operator: with keys and values even where nothing is written."""
    memory = build("before_update", "fused")
    qkv = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
    wanted = [qkv, memory.w1, memory.w2, memory.generator_weight]
    context = memory.recurrence(qkv)
    expected = memory.recurrence(qkv[..., :4])
    assert relative_error(context, expected) < 1e-12
    gradients = torch.autograd.grad(context.square().sum(), wanted)
    for a, b in zip(gradients[:3], torch.autograd.grad(expected.square().sum(), wanted[:3]), strict=True):
        assert relative_error(a, b) < 1e-12
    assert gradients[3].abs().max() == 0


@pytest.mark.parametrize("read", READS)
def test_groups_of_images_change_nothing(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images in groups of as many as there are threads, the last one smaller, against all at once."""
    memory = build(read, "fused")
    tokens = torch.randn(7, 4 * CHUNK + 5, 4, dtype=torch.float64, requires_grad=True)
    wanted = [tokens, *memory.parameters()]
    together = torch.autograd.grad(memory(tokens).square().sum(), wanted)
    monkeypatch.setattr(eager, "CACHE_BYTES_PER_THREAD", 1)
    in_groups = torch.autograd.grad(memory(tokens).square().sum(), wanted)
    for a, b in zip(in_groups, together, strict=True):
        assert relative_error(a, b) < 1e-12


def test_gelu_derivative_is_the_derivative() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    value, derivative = gelu_and_derivative(x)
    expected = torch.nn.functional.gelu(x)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(derivative, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("read", "updates"), [("before_update", 2), ("after_update", 3), ("final_state", 3)])
def test_updates_that_nothing_reads_are_not_made(implementation: str, read: str, updates: int) -> None:
    """Three chunks cost 8 d^2 multiply-accumulates a token to read and 20 to write, where they are written at all."""
    d = 8
    memory = build(read, implementation, dim=d)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        memory.recurrence(torch.randn(2, 3 * CHUNK, 3 * d, dtype=torch.float64))
    per_image = 3 * CHUNK * 8 * d * d + updates * (CHUNK * 20 * d * d + 3 * d * d)
    assert counter.get_total_flops() / 2 == 2 * per_image


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_and_values_that_nothing_reads_are_not_projected(implementation: str) -> None:
    d = 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build("before_update", implementation, dim=d)(torch.randn(2, CHUNK, d, dtype=torch.float64))
    assert counter.get_total_flops() / 2 == 2 * CHUNK * (d * d + 8 * d * d)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_reading_order_sees_what_it_says(implementation: str) -> None:
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
        memory = build(read, implementation)
        tokens = torch.randn(1, length, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x, m=memory: m(x).sum(-1), tokens)
        # Every output depends on its own query; where it sees its own chunk, on all of it.
        assert torch.equal(jacobian[0, :, 0].abs().sum(-1) > 0, expected), read


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_and_inner_gradient_stay_in_float32_under_autocast(implementation: str, dtype: torch.dtype) -> None:
    """From half-precision tokens come the same float32 operations, in both directions, as from float32 tokens."""
    torch.manual_seed(0)
    memory = NeuralMemory(8, MemoryConfig(CHUNK))
    memory.implementation = implementation
    half = torch.randn(2, 3 * CHUNK, 24).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    wanted = list(memory.parameters())[2:]
    with torch.autocast("cpu", dtype):
        output = memory.recurrence(half)
    gradients = torch.autograd.grad(output.float().sum(), [half, *wanted])
    expected = memory.recurrence(full)
    expected_gradients = torch.autograd.grad(expected.sum(), [full, *wanted])
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))
    torch.testing.assert_close(gradients[0], expected_gradients[0].to(dtype))
    for a, b in zip(gradients[1:], expected_gradients[1:], strict=True):  # with several threads not always to the bit
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("read", READS)
def test_stays_bounded_over_hundreds_of_chunks(implementation: str, read: str) -> None:
    """256 x 256 positions, as stage 1 has for a 1024 x 1024 image: 335 chunks of 196."""
    torch.manual_seed(0)
    memory = NeuralMemory(8, MemoryConfig(read=read))
    memory.implementation = implementation
    with torch.no_grad():
        output = memory(torch.randn(1, 256 * 256, 8))
    assert output.isfinite().all()
    assert output.abs().max() < 100


@pytest.mark.parametrize("read", READS)
def test_operator_keeps_its_contract(read: str) -> None:
    """Shapes without data, gradients, aliasing: what torch.compile and torch.export take on trust."""
    memory = build(read, "fused")
    qkv = torch.randn(2, 2 * CHUNK + 1, 12, dtype=torch.float64, requires_grad=True)
    tensors = qkv, memory.w1, memory.w2, memory.generator_weight, memory.generator_bias
    for keep in (True, False):
        torch.library.opcheck(
            torch.ops.convneur.neural_memory.default,
            (*(x.detach().requires_grad_(keep) for x in tensors), CHUNK, 1.0, read, keep),
        )


def test_compiles_without_graph_breaks() -> None:
    memory = build("before_update", "auto")
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    tokens = torch.randn(2, 2 * CHUNK + 1, 4, dtype=torch.float64, requires_grad=True)
    wanted = [tokens, *memory.parameters()]
    for a, b in zip(
        torch.autograd.grad(compiled(tokens).square().sum(), wanted),
        torch.autograd.grad(memory(tokens).square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_exports_with_dynamic_batch_and_length() -> None:
    """One graph for any number of chunks, from one on."""
    memory = build("before_update", "auto").eval()
    dims = {0: torch.export.Dim("images", min=1), 1: torch.export.Dim("tokens", min=1)}
    program = torch.export.export(
        memory, (torch.randn(2, 4 * CHUNK + 1, 4, dtype=torch.float64),), dynamic_shapes={"tokens": dims}
    ).module()
    for length in LENGTHS:
        tokens = torch.randn(3, length, 4, dtype=torch.float64)
        torch.testing.assert_close(program(tokens), memory(tokens))


def test_onnx_graph_needs_no_operator_of_ours() -> None:
    memory = build("before_update", "auto").eval().float()
    exported = torch.onnx.export(
        memory,
        (torch.randn(2, 2 * CHUNK + 1, 4),),
        dynamic_shapes=({0: torch.export.Dim("images", min=1)},),
        dynamo=True,
        verbose=False,
    )
    tokens = torch.randn(3, 2 * CHUNK + 1, 4)
    torch.testing.assert_close(exported(tokens)[0], memory(tokens), rtol=1e-3, atol=1e-3)


def test_bad_chunk_length() -> None:
    with pytest.raises(ValueError, match="chunk_length must be at least 1, got 0"):
        NeuralMemory(4, MemoryConfig(chunk_length=0))
