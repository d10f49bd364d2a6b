"""Steps of ZeRO 0 whose gradients aren't finite: they change nothing, and nobody waits for the device to find out.

ZeRO 1 to 3 check the norm of the gradients themselves. Under ZeRO 0 DeepSpeed would step all the same. There a flag
stops the optimizer: torch's fused ones read it on the device, like that of a gradient scaler; before any other the
host has to wait for it.
"""

from typing import cast

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor


class FiniteSteps:
    """Holds the steps of an engine of ZeRO 0 to gradients that are finite, and clips these.

    Attributes:
        norm: the last step's global gradient norm before clipping, on the device; None before the first.
        not_finite: 1 while the gradients aren't finite, 0 otherwise, on the device.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self.not_finite = torch.zeros((), device=engine.device)
        self.norm: Tensor | None = None
        stop_by(engine.basic_optimizer, self.not_finite)
        engine.clip_fp32_gradients = self._clip

    @torch.no_grad()
    def check(self) -> None:
        """Keeps the optimizer from its next step if the gradients aren't finite; they have been added up already."""
        norms = torch._foreach_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        self.norm = torch.stack(norms).norm()
        if scaler := self._engine.torch_autocast_z0_gradscaler:
            self.norm /= scaler.scale(torch.ones_like(self.norm))
        self.not_finite.copy_(~self.norm.isfinite())

    def _clip(self) -> None:
        """Scales the gradients down to a norm of `optimizer.clip_grad`.

        DeepSpeed's own would take the norm once more, one parameter at a time, and average it over ranks that all have
        the same.
        """
        limit = self._engine.gradient_clipping()
        torch.nn.utils.clip_grads_with_norm_(self._engine.module.parameters(), limit, cast(Tensor, self.norm))


def stop_by(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Makes the optimizer's steps do nothing, to weights, moments and counts, while the flag is up."""
    if type(optimizer).__module__.startswith("torch.") and all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = flag  # type: ignore[attr-defined] # what torch.amp.GradScaler sets
        return
    step = optimizer.step
    optimizer.step = lambda *words: None if flag.item() else step(*words)  # type: ignore[assignment, method-assign]
