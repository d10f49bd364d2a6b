"""From uint8 pixels to the numbers that a model is fed, on the device."""

import torch

from convneur.data.config import DataConfig


class Normalize:
    """Pixels to what the model is fed: moved to the device, scaled to 0..1, less the mean, over the deviation.

    Args:
        config: has mean and std.
        device: where the images go.
    """

    def __init__(self, config: DataConfig, device: torch.device):
        self.device = device
        self._mean = torch.tensor(config.mean, device=device).view(3, 1, 1) * 255
        self._std = torch.tensor(config.std, device=device).view(3, 1, 1) * 255

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) uint8 to (b, 3, H, W) float32 in channels_last memory format."""
        pixels = images.to(self.device, non_blocking=True).float()
        return pixels.sub_(self._mean).div_(self._std).contiguous(memory_format=torch.channels_last)
