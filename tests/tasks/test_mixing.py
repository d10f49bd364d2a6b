"""What happens on the device: normalisation, erasing, mixup and cutmix, on whatever devices there are."""

from dataclasses import replace

import pytest
import torch

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.stream.batch import Batch
from convneur.data.stream.on_device import Normalize
from convneur.tasks.mixing import DeviceTransform

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PLAIN = AugmentConfig(erase_prob=0, mixup=0, cutmix=0)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def batch_of(lanes: range, share: int = 6, size: int = 12, epoch: int = 0, step: int = 0) -> Batch:
    """`share` samples from each of `lanes`, whose pixels and labels follow from their numbers."""
    indices = torch.cat([100 * lane + torch.arange(share) for lane in lanes])
    pixels = [torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(i)) for i in indices.tolist()]
    repetitions = torch.zeros_like(indices)
    return Batch(torch.stack(pixels).to(torch.uint8), indices % 4, indices, epoch, step, lanes, repetitions)


def transform(augment: AugmentConfig, device: torch.device, smoothing: float = 0.0, seed: int = 0) -> DeviceTransform:
    return DeviceTransform(DataConfig(augment=augment), 5, label_smoothing=smoothing, seed=seed, device=device)


def test_pixels_are_normalised_into_channels_last(device: torch.device) -> None:
    config = DataConfig(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    pixels = batch_of(range(2)).images
    images = Normalize(config, device)(pixels)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (config.mean, config.std))
    torch.testing.assert_close(images.cpu().double(), (pixels.double() / 255 - mean) / std, rtol=0, atol=2e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images.dtype, images.device.type) == (torch.float32, device.type)


def test_without_mixing_targets_are_smoothed_labels(device: torch.device) -> None:
    batch = batch_of(range(3), share=5)  # an odd number is fine
    images, targets = transform(PLAIN, device, smoothing=0.1)(batch)
    expected = torch.nn.functional.one_hot(batch.labels, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(targets.cpu(), expected)
    assert torch.equal(images, Normalize(DataConfig(), device)(batch.images))


def test_mixup_blends_each_lane_with_its_reverse(device: torch.device) -> None:
    batch = batch_of(range(4))
    images, targets = transform(replace(PLAIN, mixup=0.8), device, smoothing=0.1)(batch)
    plain = Normalize(DataConfig(), device)(batch.images)
    smooth = (torch.nn.functional.one_hot(batch.labels, 5) * 0.9 + 0.1 / 5).to(device)
    weights = []
    for lane in range(4):
        group = slice(6 * lane, 6 * (lane + 1))
        own, other = smooth[group], smooth[group].flip(0)
        weight = ((targets[group] - other)[0, own[0].argmax()] / (own - other)[0, own[0].argmax()]).item()
        torch.testing.assert_close(targets[group], weight * own + (1 - weight) * other)
        torch.testing.assert_close(images[group], weight * plain[group] + (1 - weight) * plain[group].flip(0))
        weights.append(weight)
    assert len(set(weights)) == 4
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(targets.sum(1).cpu(), torch.ones(24))


def test_cutmix_weighs_targets_by_the_pixels_that_are_left(device: torch.device) -> None:
    batch = batch_of(range(8))
    images, targets = transform(replace(PLAIN, cutmix=1.0), device)(batch)
    plain = Normalize(DataConfig(), device)(batch.images)
    labels = torch.nn.functional.one_hot(batch.labels, 5).to(device)
    for lane in range(8):
        group = slice(6 * lane, 6 * (lane + 1))
        own, other = plain[group], plain[group].flip(0)
        kept = (images[group] == own).all(1)
        assert torch.equal(images[group], torch.where(kept[:, None], own, other))
        weight = kept.float().mean((1, 2))
        assert len(weight.unique()) == 1
        torch.testing.assert_close(targets[group], weight[0] * labels[group] + (1 - weight[0]) * labels[group].flip(0))


def test_mixing_depends_on_seed_epoch_step_and_lane_alone(device: torch.device) -> None:
    augment = replace(PLAIN, mixup=0.8, cutmix=1.0, erase_prob=0.5)
    mix = transform(augment, device)
    images, targets = mix(batch_of(range(8)))
    for lanes in (range(4), range(4, 8), range(3, 4)):
        part_images, part_targets = mix(batch_of(lanes))
        group = slice(6 * lanes.start, 6 * lanes.stop)
        assert torch.equal(part_images, images[group])
        assert torch.equal(part_targets, targets[group])
    assert not torch.equal(mix(batch_of(range(8), step=1))[1], targets)
    assert not torch.equal(mix(batch_of(range(8), epoch=1))[1], targets)
    assert not torch.equal(transform(augment, device, seed=1)(batch_of(range(8)))[1], targets)


def test_mixing_is_drawn_with_the_given_probabilities() -> None:
    lanes = range(600)
    batch = batch_of(lanes, share=2, size=4)
    plain = Normalize(DataConfig(), torch.device("cpu"))(batch.images)
    augment = AugmentConfig(erase_prob=0, mixup=1.0, cutmix=1.0, mix_prob=0.6, mix_switch_prob=0.25)
    images, _ = transform(augment, torch.device("cpu"))(batch)
    groups, plain_groups = images.view(600, 2, 3, 4, 4), plain.view(600, 2, 3, 4, 4)
    changed = (groups != plain_groups).flatten(1).any(1)
    blended = ((groups != plain_groups) & (groups != plain_groups.flip(1))).flatten(1).any(1)
    assert abs(blended.float().mean() - 0.6 * 0.75) < 0.06
    assert abs(changed.float().mean() - 0.6) < 0.1  # a cut of a few pixels may be empty


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_depends_on_seed_epoch_and_sample_alone(device: torch.device, mode: str) -> None:
    augment = replace(PLAIN, erase_prob=0.5, erase_mode=mode)
    erase = transform(augment, device)
    batch = batch_of(range(40))
    plain = Normalize(DataConfig(), device)(batch.images)
    images, _ = erase(batch)
    erased = (images != plain).flatten(1).any(1)
    assert 0.35 < erased.float().mean() < 0.65
    share = (images != plain).any(1)[erased].float().mean((1, 2))
    assert 0.005 < share.min() <= share.max() < 0.5
    alone, _ = erase(batch_of(range(7, 8)))
    assert torch.equal(alone, images[42:48])
    assert not torch.equal(erase(replace(batch, epoch=1))[0], images)
    assert torch.equal(erase(replace(batch, step=1))[0], images)


def test_the_devices_generators_are_left_alone(device: torch.device) -> None:
    def draw() -> torch.Tensor:
        return torch.rand(2, device=device)

    torch.manual_seed(1)
    expected = draw()
    torch.manual_seed(1)
    transform(AugmentConfig(), device)(batch_of(range(2)))
    assert torch.equal(draw(), expected)
