"""Checkpoints as files for others: safetensors (for timm), ONNX, and PyTorch's exported programs.

A file is read back by its own runtime and held against the model before it gets its name. Each carries the run's
configuration as text, so that whoever has the file knows normalisation and image size, and the names of the classes in
JSON if the checkpoint keeps them.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import Dim

from convneur.config import config_text
from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.engine.engine import Weights
from convneur.models.backbone import Model
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.mixers import Titans
from convneur.records.checkpoint import load_weights, read_classes
from convneur.records.folder import CLASSES_FILE, CONFIG_FILE
from convneur.tools.trained import open_trained

Format = Literal["safetensors", "onnx", "torch"]
Texts = dict[str, str]  # "config" in YAML and, if they are known, "classes" in JSON
Run = Callable[[Tensor], Tensor]  # normalised images (B, C, H, W) -> logits (B, classes)

SUFFIXES: dict[Format, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4  # of the largest logit
SMALLEST_OPEN_SIZE = 96  # exporters take sides of 1, such as the last stage's map or a shift in it has, for constants


@dataclass(frozen=True)
class Export:
    """An exported file.

    Attributes:
        path: where it is.
        difference: largest absolute difference between one of its logits and the checkpoint's.
        any_size: whether it takes images of any size, exported programs of at least 96 pixels a side; any batch it
            takes in any case.
    """

    path: Path
    difference: float
    any_size: bool


@torch.no_grad()
def export_checkpoint(path: Path, kind: Format, out: Path | None = None, averaged: bool = False) -> Export:
    """Writes a checkpoint as a file of another format.

    Args:
        path: folder of the checkpoint, or of a run, whose newest is taken.
        kind: safetensors holds the weights, by their names in timm's `convneur_*` models; onnx and torch hold the
            graph too and need no code of this package.
        out: file to write; None for the name of the run, in the working folder.
        averaged: whether to take the averaged weights.

    Raises:
        InputError: the checkpoint can't be read or the file can't be written.
        RuntimeError: the file gives other logits than the checkpoint; it is not kept.
    """
    trained = open_trained(path, averaged)
    checkpoint, config, model = trained.checkpoint, trained.config, trained.model(mapped=True)

    side = config.data.image_size
    unrolled = any(isinstance(module, Titans) for module in model.modules())
    any_size = not unrolled and (kind != "torch" or side >= SMALLEST_OPEN_SIZE)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, side, side), (3, side, side), *([(2, 2 * side, side + 32)] if any_size else [])]
    inputs = [torch.randn(b, config.model.in_chans, h, w, generator=generator) for b, h, w in shapes]
    expected = [model(x) for x in inputs]
    traced = max(side, SMALLEST_OPEN_SIZE) if any_size else side
    example = torch.zeros(2, config.model.in_chans, traced, traced)

    texts = {"config": config_text(config)}
    if classes := read_classes(checkpoint):
        texts["classes"] = json.dumps(classes)
    out = out or Path(config.run.name + SUFFIXES[kind])
    write = {"safetensors": _write_safetensors, "onnx": _write_onnx, "torch": _write_program}[kind]
    with TemporaryDirectory(prefix="convneur-export-") as folder:
        file = Path(folder) / f"model{SUFFIXES[kind]}"
        run = write(model, example, any_size, load_weights(checkpoint, averaged), texts, file)
        # Not Python's max, which passes over a NaN.
        differences = [(run(x) - y).abs().max() for x, y in zip(inputs, expected, strict=True)]
        difference = torch.stack(differences).max().item()
        if not difference <= TOLERANCE * max(y.abs().max().item() for y in expected):
            raise RuntimeError(f"the {kind} file gives logits that differ from the checkpoint's by {difference:.2g}")
        try:
            with file.open("rb") as source, atomic_write(out) as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise InputError(f"{out} can't be written ({error.strerror}); choose another with --out") from error
    return Export(out, difference, any_size)


def _write_safetensors(
    model: Model, example: Tensor, any_size: bool, weights: Weights, texts: Texts, file: Path
) -> Run:
    """The checkpoint's own weights and buffers, of whatever ZeRO stage and world size, with more texts in the file."""
    save_file(weights, file, metadata=texts)
    model.load_state_dict(load_file(file), assign=True)
    return model


def _write_onnx(model: Model, example: Tensor, any_size: bool, weights: Weights, texts: Texts, file: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx.export needs it)
    except ImportError as error:
        raise InputError(f"--format onnx needs {error.name}: pip install 'convneur[onnx]'") from error
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_open_dimensions(any_size),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(texts)
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _write_program(model: Model, example: Tensor, any_size: bool, weights: Weights, texts: Texts, file: Path) -> Run:
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            module.implementation = "scan" if any_size else "plain"  # nothing that only this package defines
    program = torch.export.export(model, (example,), dynamic_shapes=_open_dimensions(any_size))
    names = {"config": CONFIG_FILE, "classes": CLASSES_FILE}
    torch.export.save(program, file, extra_files={names[key]: text for key, text in texts.items()})
    return torch.export.load(file).module()


def _open_dimensions(any_size: bool) -> dict[str, dict[int, Any]]:
    sizes = (0, 2, 3) if any_size else (0,)
    return {"x": dict.fromkeys(sizes, Dim.DYNAMIC)}
