"""Exported graphs against the model: torch.compile, torch.export and ONNX, with batch and image size left open."""

from pathlib import Path
from typing import Any, get_args

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from convneur.models.convneur.config import VARIANTS, MemoryConfig, MixerKind, ModelConfig, Variant
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.mixers import MIXERS
from convneur.models.convneur.model import ConvNeur
from convneur.ops.memory.reading import ReadOrder

READS = get_args(ReadOrder)
KINDS = get_args(MixerKind)
OPEN_BATCH = {0: Dim("batch", min=1)}
OPEN = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
# Stages of one chunk and of several, with whole and with ragged last chunks. The first, which graphs are traced with,
# has stages of one chunk that the others have several of.
SIZES = [(64, 64), (64, 96), (128, 128), (78, 113)]


@pytest.fixture(autouse=True)
def one_block_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes a second a block."""
    monkeypatch.setitem(VARIANTS, "n1", Variant((1, 1, 1, 1), 16))


def create() -> nn.Module:
    """A small model whose global branches matter."""
    torch.manual_seed(0)
    memory = MemoryConfig(chunk_length=90)
    return ConvNeur(ModelConfig("n1", num_classes=10, memory=memory, layer_scale=1.0)).eval()


def mixer(kind: MixerKind) -> nn.Module:
    torch.manual_seed(0)
    return MIXERS[kind](8, MemoryConfig(chunk_length=20)).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def onnx_session(model: nn.Module, x: Tensor, dynamic: dict[int, Any], folder: Path) -> onnxruntime.InferenceSession:
    with torch.no_grad():  # PyTorch can't differentiate a scan of open size
        program = torch.onnx.export(model, (x,), dynamic_shapes={"x": dynamic}, verbose=False)
    program.save(folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def assert_same(session: onnxruntime.InferenceSession, model: nn.Module, x: Tensor) -> None:
    (actual,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(actual), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("read", READS)
def test_scan_equals_the_loop(read: ReadOrder) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(4, MemoryConfig(chunk_length=6, read=read)).double()
    for parameter in memory.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = noise(2, 17, 4).double()
    outputs = []
    for memory.implementation in ("scan", "plain"):
        outputs.append(memory(x))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)


def test_model_compiles_without_graph_breaks() -> None:
    model, x = create(), noise(2, 3, *SIZES[0])
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_model_exports_with_open_batch_and_size() -> None:
    model = create()
    exported = torch.export.export(model, (noise(2, 3, *SIZES[0]),), dynamic_shapes={"x": OPEN}).module()
    for size in SIZES:
        x = noise(3, 3, *size)
        torch.testing.assert_close(exported(x), model(x))


def test_model_in_onnx_with_open_batch_and_size(tmp_path: Path) -> None:
    model = create()
    session = onnx_session(model, noise(2, 3, *SIZES[0]), OPEN, tmp_path)
    for size in SIZES:
        assert_same(session, model, noise(3, 3, *size))


def test_final_state_in_onnx_with_open_batch_and_size(tmp_path: Path) -> None:
    """Here every chunk's update matters, those of padding alone too."""
    model = MIXERS["neural_memory"](8, MemoryConfig(chunk_length=20, read="final_state")).eval()
    session = onnx_session(model, noise(2, 6, 7, 8), dict.fromkeys((0, 1, 2), Dim.DYNAMIC), tmp_path)
    for height, width in [(6, 7), (2, 3), (8, 10)]:
        assert_same(session, model, noise(3, height, width, 8))


def test_model_in_onnx_with_open_batch(tmp_path: Path) -> None:
    model = create()
    session = onnx_session(model, noise(2, 3, *SIZES[0]), OPEN_BATCH, tmp_path)
    for batch in (1, 5):
        assert_same(session, model, noise(batch, 3, *SIZES[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_mixers_compile_and_export_with_open_batch(kind: MixerKind, tmp_path: Path) -> None:
    model, x, larger = mixer(kind), noise(2, 6, 7, 8), noise(5, 6, 7, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": OPEN_BATCH}).module()
    torch.testing.assert_close(exported(larger), model(larger))
    assert_same(onnx_session(model, x, OPEN_BATCH, tmp_path), model, larger)
