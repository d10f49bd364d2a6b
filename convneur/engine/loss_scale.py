"""The scale of the loss, and so of the gradients, in float16, as ZeRO's optimizers need it.

Under float16 autocast DeepSpeed 0.19.8 gives ZeRO 1 to 3 a `torch.amp.GradScaler` that divides the gradients only after
they have been measured and clipped, and that grows once for every parameter group. Their own way of scaling, which they
use for `deepspeed.fp16`, divides first. It has one fault as well: in the step in which the scale grows, gradients are
divided by the scale that the next step is meant for.
"""

from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase


class LossScaler(LossScalerBase):  # type: ignore[misc] # DeepSpeed has no types
    """The schedule of `torch.amp.GradScaler`, which ZeRO 0 has, and its state, for the optimizers of ZeRO 1 to 3."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.load_state_dict(torch.amp.GradScaler("cpu").state_dict())

    def update_scale(self, overflow: bool) -> None:
        """Takes in that a step has been made, or skipped as its gradients weren't finite."""
        state = self._state
        state["_growth_tracker"] = 0 if overflow else state["_growth_tracker"] + 1
        if overflow:
            self.cur_scale *= state["backoff_factor"]
        elif state["_growth_tracker"] == state["growth_interval"]:
            self.cur_scale *= state["growth_factor"]
            state["_growth_tracker"] = 0

    def state_dict(self) -> dict[str, Any]:
        """What a GradScaler's `state_dict` would be."""
        return self._state | {"scale": self.cur_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state, of this class or of a GradScaler."""
        self._state = dict(state)
        self.cur_scale = state["scale"]


def mend_loss_scale(engine: DeepSpeedEngine) -> None:
    """Makes an engine of ZeRO 1 to 3 measure, clip and step gradients that have been divided by their own scale."""
    optimizer = engine.optimizer
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        optimizer.torch_autocast_gradscaler = None
        optimizer.loss_scaler = LossScaler()
    elif not getattr(getattr(optimizer, "loss_scaler", None), "dynamic", False):
        return
    else:
        optimizer.loss_scaler.raise_error_at_min_scale = False  # the guards judge how many bad steps are too many
    step = optimizer.step

    def step_then_scale(*words: Any) -> None:
        step(*words)
        optimizer.loss_scaler.update_scale(optimizer.overflow)

    optimizer._update_scale = lambda *_: None
    optimizer.step = step_then_scale
