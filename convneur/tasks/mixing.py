"""A micro-batch on the device: its images erased and mixed, and the distributions over classes that follow.

Legend: b samples in a micro-batch, H x W pixels, K classes.
"""

import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing

from convneur.data.config import DataConfig
from convneur.data.keys import key, libraries_restored, seed_libraries, view_key
from convneur.data.stream.batch import Batch
from convneur.data.stream.on_device import Normalize


class DeviceTransform:
    """What is left to do to a micro-batch once it is on the device.

    A sample is erased by a key of (seed, epoch, sample, repetition). Mixing pairs the samples that a lane contributes
    to a step, the first with the last and so on, by a key of (seed, epoch, step, lane). So neither depends on the
    number of ranks.

    Args:
        config: has mean, std and augment.
        num_classes: K.
        label_smoothing: probability mass spread over all classes.
        seed: the run's seed.
        device: where the model is.
    """

    def __init__(
        self, config: DataConfig, num_classes: int, *, label_smoothing: float, seed: int, device: torch.device
    ):
        augment = config.augment
        self._seed, self._device = seed, device
        self._num_classes, self._label_smoothing = num_classes, label_smoothing
        self._normalize = Normalize(config, device)
        self._erase = self._mixup = None
        if augment.erase_prob:
            self._erase = RandomErasing(augment.erase_prob, mode=augment.erase_mode, device=device)
        if augment.mixup or augment.cutmix:
            self._mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes a micro-batch the model's.

        Returns:
            images (b, 3, H, W) float32 in channels_last memory format, and targets (b, K) float32 whose rows sum to 1.
        """
        images = self._normalize(batch.images)
        labels = batch.labels.to(self._device, non_blocking=True)
        with libraries_restored(self._device):
            if self._erase is not None:
                views = zip(images, batch.indices.tolist(), batch.repetitions.tolist(), strict=True)
                for image, index, repetition in views:
                    seed_libraries(view_key(self._seed, "erase", batch.epoch, index, repetition), self._device)
                    self._erase(image)
            if self._mixup is None:
                return images, mixup_target(labels, self._num_classes, smoothing=self._label_smoothing)
            targets = []
            groups = zip(batch.lanes, images.chunk(len(batch.lanes)), labels.chunk(len(batch.lanes)), strict=True)
            for lane, lane_images, lane_labels in groups:
                seed_libraries(key(self._seed, "mix", batch.epoch, batch.step, lane))
                targets.append(self._mixup(lane_images, lane_labels)[1])  # mixes the images in place
            return images, torch.cat(targets)
