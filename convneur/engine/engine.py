"""What a run asks of DeepSpeed, in one object: nothing outside of this room names an attribute of DeepSpeed's own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from convneur.engine.buffers import Buffers
from convneur.engine.finite import FiniteSteps

Weights = dict[str, Tensor]


class Engine:
    """A model and its optimizer under DeepSpeed.

    Steps whose gradients aren't finite leave weights, moments, counts of steps and buffers as they are, under every
    ZeRO stage.

    Attributes:
        deepspeed: DeepSpeed's engine.
        module: the model in it; ZeRO 3 leaves nothing in its parameters between two steps.
        device: where it is.
        buffers: the model's persistent ones, the same on every rank between two steps.
        stage: of ZeRO, 0 to 3: which of optimizer state (1), gradients (2) and parameters (3) are partitioned.
    """

    def __init__(self, deepspeed: DeepSpeedEngine) -> None:
        self.deepspeed = deepspeed
        self.module: Any = deepspeed.module  # an nn.Module, whose parameters DeepSpeed gives attributes of its own
        self.device: torch.device = torch.device(deepspeed.device)
        self.buffers = Buffers(self.module)
        self.stage = int(deepspeed.zero_optimization_stage())
        self._finite = FiniteSteps(deepspeed) if self.stage == 0 else None

    def __call__(self, *inputs: Any) -> Any:
        """What the model makes of a micro-batch, under the engine's precision."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradients to those of the step; after its last, to those of the other ranks."""
        self.deepspeed.backward(loss)

    def step(self) -> None:
        """Ends a micro-batch; after the last of a step, clips the gradients and steps the optimizer. Collective."""
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if self._finite and last:
            self._finite.check()
        self.deepspeed.step()
        if last:
            self.buffers.settle(self.skipped)

    def gradient_norm(self) -> Tensor | float | None:
        """The last step's global gradient norm before clipping; None where DeepSpeed doesn't tell."""
        if self._finite:
            return self._finite.norm
        norm: Tensor | float | None = self.deepspeed.get_global_grad_norm()
        return norm

    @property
    def skipped(self) -> Tensor | bool:
        """Whether the last step was skipped, as its gradients weren't finite; a flag on the device under ZeRO 0."""
        if self._finite:
            return self._finite.not_finite.clone()
        return bool(self.deepspeed.optimizer.overflow)

    @property
    def learning_rate(self) -> float:
        """Learning rate that the optimizer is set to; under muP the one before a group's own scale."""
        group = self.deepspeed.basic_optimizer.param_groups[0]
        return float(group["lr"] / group.get("lr_scale", 1.0))

    @property
    def parameters(self) -> int:
        """How many parameters the model has, those that are on other ranks included."""
        return sum(true_shape(parameter).numel() for parameter in self.module.parameters())

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the order of summation depends on, and so the last bits of a step."""
        return {
            "zero_stage": self.stage,
            "world_size": dist.get_world_size(),
            "accumulation": self.deepspeed.gradient_accumulation_steps(),
        }

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of what every rank holds alike: buffers, weights below ZeRO 3, moments under ZeRO 0."""
        yield from self.buffers.named().items()
        for name, parameter in self.module.named_parameters() if self.stage < 3 else ():
            yield name, parameter
            if self.stage == 0:
                for key, value in self.deepspeed.basic_optimizer.state[parameter].items():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        yield f"{key} of {name}", value

    def around_forward(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Has one function called before, and another after, every forward pass."""
        self.deepspeed.register_forward_pre_hook(lambda *_: before())
        self.deepspeed.register_forward_hook(lambda *_: after())

    def destroy(self) -> None:
        """Lets go of what DeepSpeed keeps beyond the engine's life."""
        self.deepspeed.destroy()


def true_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter that ZeRO 3 may have emptied."""
    return getattr(parameter, "ds_shape", parameter.shape)
