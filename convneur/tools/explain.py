"""What the gates of a trained model do to an image: one figure, and the numbers behind it.

Shape legend: H x W positions of a stage, C its channels, T chunks of its memory, L tokens a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor, nn

from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.data.stream.on_device import Normalize
from convneur.data.views.decode import decode, in_one_line
from convneur.data.views.transforms import EvalTransform
from convneur.models.convneur.branches import GlobalBranch
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.mixers import MemoryMixer
from convneur.models.convneur.model import ConvNeur
from convneur.ops.memory.equations import MemoryState, recurrence, update_factors
from convneur.records.checkpoint import read_classes
from convneur.tools.trained import open_trained


@dataclass(frozen=True)
class GateView:
    """What the first global branch of a stage does to one image.

    Attributes:
        gate: A = sigmoid(G), in (0, 1), (H, W, C).
        surprise: mean squared error with which the memory recalls each chunk before it writes it, (T,); None where
            the branch is no neural memory.
        chunk_length: tokens of a chunk, L, in raster order; None where the branch is no neural memory.
    """

    gate: Tensor
    surprise: Tensor | None
    chunk_length: int | None

    @property
    def map(self) -> Tensor:
        """Mean gate over the channels, (H, W)."""
        return self.gate.mean(-1)

    @property
    def surprise_map(self) -> Tensor | None:
        """The surprise of the chunk that each position belongs to, (H, W)."""
        if self.surprise is None or self.chunk_length is None:
            return None
        height, width, _ = self.gate.shape
        return self.surprise.repeat_interleave(self.chunk_length)[: height * width].view(height, width)


@dataclass(frozen=True)
class Explanation:
    """A model's view of an image.

    Attributes:
        pixels: the image as the model is shown it, (H, W, 3) uint8.
        probabilities: of the classes, (K,).
        stages: the gates, finest stage first.
        classes: their names; none where the checkpoint doesn't keep them.
    """

    pixels: Tensor
    probabilities: Tensor
    stages: list[GateView]
    classes: tuple[str, ...] = ()


@torch.no_grad()
def explain(path: Path, image: Path, averaged: bool = False) -> Explanation:
    """Looks at an image with a checkpoint, or with a run's newest.

    Raises:
        InputError: the checkpoint or the image can't be read, or the model has no gates.
    """
    trained = open_trained(path, averaged)
    checkpoint, config = trained.checkpoint, trained.config
    for key, value, needed in (("fusion", config.model.fusion, "gate"), ("placement", config.model.placement, None)):
        if value == "none" or (needed and value != needed):
            raise InputError(f"{checkpoint} has model.{key} = {value}, so there are no gates to look at")
    try:
        picture = decode(image.read_bytes())
    except OSError as error:
        raise InputError(f"{image} can't be read ({error.strerror}), expected an image file") from error
    except (ValueError, MemoryError) as error:
        raise InputError(f"{image} can't be read ({in_one_line(error)}), expected an image file") from error

    model = trained.model()
    if not isinstance(model, ConvNeur):
        raise InputError(f"{checkpoint} is of {config.model.variant}: only ConvNeur has gates to look at")
    pixels = EvalTransform(config.data)(picture)
    logits, stages = look(model, Normalize(config.data, torch.device("cpu"))(pixels[None]))
    return Explanation(pixels.permute(1, 2, 0), logits[0].softmax(-1), stages, read_classes(checkpoint))


def look(model: ConvNeur, image: Tensor) -> tuple[Tensor, list[GateView]]:
    """Runs a model with gates on one image (1, C, H, W); returns its logits (1, K) and a view of every stage."""
    contexts: dict[int, Tensor] = {}
    surprises: dict[int, Tensor] = {}
    branches: list[GlobalBranch] = []
    hooks = []
    for index, stage in enumerate(model.stages):
        branch = stage.get_submodule("blocks.0.global_branch")
        assert isinstance(branch, GlobalBranch)
        branches.append(branch)
        hooks.append(branch.register_forward_hook(lambda _, __, out, index=index: contexts.update({index: out})))
        if isinstance(branch.mixer, MemoryMixer):
            hooks.append(
                branch.mixer.memory.register_forward_hook(
                    lambda memory, tokens, _, index=index: surprises.update({index: surprise_of(memory, *tokens)})
                )
            )
    try:
        logits = model(image)
    finally:
        for hook in hooks:
            hook.remove()

    def chunk_length(mixer: nn.Module) -> int | None:
        return mixer.memory.config.chunk_length if isinstance(mixer, MemoryMixer) else None

    return logits, [
        GateView(contexts[i][0].sigmoid(), surprises.get(i), chunk_length(branch.mixer))
        for i, branch in enumerate(branches)
    ]


def surprise_of(memory: NeuralMemory, tokens: Tensor) -> Tensor:
    """Mean squared recall error of each chunk of one image's tokens (1, N or H, W, d), (T,).

    The states do not depend on what is read from them, so an order of reading that makes every update shows all.
    """
    surprises: list[Tensor] = []
    factors = partial(
        update_factors, weight=memory.generator_weight, bias=memory.generator_bias, inner_lr=memory.config.inner_lr
    )

    def record(surprise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        surprises.append(surprise.mean())
        return factors(surprise)

    qkv = F.linear(tokens.flatten(1, -2), memory.qkv_weight, memory.qkv_bias)
    recurrence(qkv, MemoryState(memory.w1, memory.w2), record, memory.config.chunk_length, "after_update")
    return torch.stack(surprises)


def draw(explanation: Explanation, path: Path) -> None:
    """Draws gates, surprise and gate statistics of every stage into a picture, of the kind that its suffix names.

    Raises InputError where it can't be written.
    """
    stages = explanation.stages
    with plt.rc_context({"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(10, 6.2), layout="constrained")
        grid = figure.subplots(3, len(stages) + 1)
        _draw_input(grid[0, 0], explanation)
        _draw_surprise(grid[1, 0], stages)
        _draw_statistics(grid[2, 0], stages)
        for number, stage in enumerate(stages, 1):
            gate, surprise, histogram = grid[:, number]
            height, width, channels = stage.gate.shape
            _draw_map(gate, stage.map, "viridis")
            gate.set_title(f"stage {number}: mean gate\n{height} x {width}, {channels} channels")
            if stage.surprise is None or stage.surprise_map is None:
                surprise.set_axis_off()
            elif len(stage.surprise) > 1:
                _draw_map(surprise, stage.surprise_map, "magma")
                surprise.set_title(f"surprise, {len(stage.surprise)} chunks")
            else:
                surprise.text(0.5, 0.5, f"one chunk,\nsurprise {stage.surprise.item():.3g}", ha="center", va="center")
                surprise.set_axis_off()
            histogram.hist(
                stage.gate.flatten().numpy(), bins=50, range=(0, 1), density=True, color=_colour(number, stages)
            )
            histogram.set(title="gate values", xlabel="A", xlim=(0, 1), yticks=[])
            histogram.spines["left"].set_visible(False)
        try:
            with atomic_write(path) as file:
                figure.savefig(file, format=path.suffix[1:] or "png", dpi=200)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} can't be written ({reason}); choose another with --output") from error
        finally:
            plt.close(figure)


def _colour(number: int, stages: Sequence[GateView]) -> tuple[float, ...]:
    return tuple(plt.get_cmap("viridis")((number - 1) / len(stages)))


def _draw_input(axes: Axes, explanation: Explanation) -> None:
    probability, top = explanation.probabilities.max(0)
    axes.imshow(explanation.pixels.numpy())
    name = explanation.classes[int(top)] if explanation.classes else top.item()
    axes.set_title(f"input\nclass {name}, p = {probability.item():.2f}", parse_math=False)
    _hide_frame(axes)


def _draw_map(axes: Axes, values: Tensor, colours: str) -> None:
    axes.figure.colorbar(axes.imshow(values.numpy(), cmap=colours), ax=axes, shrink=0.8)
    _hide_frame(axes)


def _draw_surprise(axes: Axes, stages: Sequence[GateView]) -> None:
    """Surprise against the part of the image that was read before; a stage of one chunk is a point."""
    for number, stage in enumerate(stages, 1):
        if stage.surprise is not None and stage.chunk_length is not None:
            tokens = stage.gate.shape[0] * stage.gate.shape[1]
            read = [chunk * stage.chunk_length / tokens for chunk in range(len(stage.surprise))]
            colour = _colour(number, stages)
            axes.plot(read, stage.surprise.numpy(), marker="o", markersize=3, color=colour, label=f"stage {number}")
    if not axes.lines:
        axes.set_axis_off()
        return
    axes.set(title="surprise of each chunk", xlabel="part of the image read", xlim=(-0.05, 1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_statistics(axes: Axes, stages: Sequence[GateView]) -> None:
    """Mean gate of each stage, with the standard deviation over all its positions and channels."""
    for number, stage in enumerate(stages, 1):
        mean, deviation = stage.gate.mean().item(), stage.gate.std().item()
        axes.errorbar(number, mean, deviation, fmt="o", capsize=4, color=_colour(number, stages))
    axes.axhline(0.5, linewidth=0.8, linestyle=":", color="grey")
    axes.set(title="gate, mean ± deviation", xlabel="stage", ylim=(0, 1), xticks=range(1, len(stages) + 1))


def _hide_frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
