"""What a run measures of itself beside losses: gradients, arithmetic, memory, and waiting for data."""

import resource
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from convneur.models.convneur.config import ModelConfig
from convneur.models.describe import describe
from convneur.system.gpu import gpu_called
from convneur.system.world import World


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that a device can do at most in bfloat16; None where it isn't known, as on CPUs."""
    if device.type != "cuda":
        return None
    gpu = gpu_called(torch.cuda.get_device_name(device))
    return gpu.half_tflops * 1e12 if gpu else None


def step_flops(config: ModelConfig, image_size: int) -> float:
    """FLOPs of a training step, an image: the forward pass's matrix products and convolutions, and twice those.

    Two operations a multiply-accumulate. What activation recomputation does a second time doesn't count: it trains
    nothing.
    """
    return 3 * 2e9 * describe(config, image_size).gmacs


class Gauges:
    """Reads a rank's gauges whenever a line of metrics is due; in between it does nothing but add up the waiting.

    Args:
        world: this process among the ranks.
        flops_per_image: what `step_flops` says.
        gradient_norm: the last step's global gradient norm before clipping, which may still be on the device.
        bad_samples: this rank's unreadable samples so far.
    """

    def __init__(
        self,
        world: World,
        flops_per_image: float,
        gradient_norm: Callable[[], Tensor | float | None],
        bad_samples: Mapping[int, str],
    ) -> None:
        self._world, self._bad_samples, self._gradient_norm = world, bad_samples, gradient_norm
        self._flops_per_image = flops_per_image
        self._peak = peak_flops(world.device)
        self._waited = 0.0

    def add_wait(self, seconds: float) -> None:
        """Counts some seconds of waiting for data."""
        self._waited += seconds

    def read(self, seconds: float, images_per_second: float) -> dict[str, float]:
        """This rank's values since the last reading, `seconds` ago; the rate is that of all ranks together."""
        flops = images_per_second / self._world.size * self._flops_per_image
        values = {
            "train/data_wait": min(self._waited / max(seconds, 1e-9), 1.0),
            "train/tflops_per_rank": flops / 1e12,
            "train/memory_gib": peak_memory(self._world.device) / 2**30,
            "train/bad_samples": float(len(self._bad_samples)),
        }
        if self._peak:
            values["train/mfu"] = flops / self._peak
        norm = self._gradient_norm()
        if norm is not None:
            values["train/grad_norm"] = float(norm)
        self._waited = 0.0
        return values


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have held so far: on a GPU; of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
