"""Whether a model's memories stay finite: large steps, or many of them, let their states grow without end."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convneur.data.errors import InputError
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.mixers import Titans
from convneur.models.convneur.model import ConvNeur


def check_memories(model: ConvNeur, image_size: int) -> None:
    """Raises InputError where a memory overflows with the weights that the model has."""
    if memory := overflowing_memory(model, image_size):
        raise InputError(
            f"{memory} overflows on an image of {image_size} x {image_size} pixels with the initial weights: set"
            " model.memory.inner_lr lower (or model.inner_lrs; the paper has 1 at most), or model.memory.chunk_length"
            " higher (or model.chunk_lengths)"
        )


@torch.no_grad()
def overflowing_memory(model: ConvNeur, image_size: int) -> str | None:
    """The first memory that makes of finite tokens of an image of noise what isn't finite, in words; None without one.

    The noise is always the same, and no generator is touched.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not found and inputs[0].isfinite().all() and not output.isfinite().all():
            found.append(f"the memory {name} ({_settings(module)})")

    memories = [(name, module) for name, module in model.named_modules() if isinstance(module, NeuralMemory | Titans)]
    handles = [module.register_forward_hook(partial(look, name)) for name, module in memories]
    weight, training = next(model.parameters()), model.training
    noise = torch.randn(1, model.in_chans, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        model.eval()(noise.to(weight.device, weight.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _settings(module: Any) -> str:
    if isinstance(module, NeuralMemory):
        return f"chunk_length {module.config.chunk_length}, inner_lr {module.config.inner_lr:g}"
    return f"chunk_length {module.chunk_length}, inner_lr {module.update_generator.inner_lr:g}"
