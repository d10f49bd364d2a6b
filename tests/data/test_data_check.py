"""Settings that can't work are found before anything is allocated."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convneur.data.check import check_data
from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.errors import InputError


@pytest.fixture
def config(digits: Path) -> DataConfig:
    return DataConfig(root=str(digits), image_size=32, global_batch_size=64, lanes=8, workers=0)


def complaint(config: DataConfig, *, num_classes: int = 10, world_size: int = 2, accumulation: int = 2) -> str:
    with pytest.raises(InputError) as caught:
        check_data(config, num_classes=num_classes, world_size=world_size, accumulation=accumulation)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2), (1, 8), (8, 1)])
def test_what_fits_is_accepted(config: DataConfig, world_size: int, accumulation: int) -> None:
    check_data(config, num_classes=10, world_size=world_size, accumulation=accumulation)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"global_batch_size": 60}, "data.global_batch_size 60 is not a multiple of data.lanes 8"),
        ({"lanes": 2}, "data.lanes 2 is not a multiple of 4 (2 ranks times train.accumulation 2)"),
        ({"global_batch_size": 56}, "data.global_batch_size 56 / data.lanes 8 is odd, but mixup and cutmix need pairs"),
        ({"global_batch_size": 1440}, "data.global_batch_size is 1440 but"),
        ({"global_batch_size": 0}, "data.global_batch_size is 0"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"lanes": 0}, "data.lanes is 0"),
        ({"window": 0}, "data.window is 0"),
        ({"repeats": 0}, "data.repeats is 0"),
        ({"workers": -1}, "data.workers is -1"),
        ({"eval_batch_size": 0}, "data.eval_batch_size is 0"),
        ({"eval_crop": 0.0}, "data.eval_crop is 0.0"),
        ({"eval_crop": 1.1}, "data.eval_crop is 1.1"),
        ({"std": (0.2, 0.0, 0.2)}, "data.std is (0.2, 0.0, 0.2)"),
        ({"root": "nowhere"}, "nowhere does not exist"),
        ({"train_split": "test"}, "no split 'test'"),
        ({"val_split": "test"}, "no split 'test'"),
    ],
)
def test_settings_that_do_not_fit_are_named(config: DataConfig, changes: dict[str, Any], expected: str) -> None:
    assert expected in complaint(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scale": (0.0, 1.0)}, "data.augment.scale is (0.0, 1.0)"),
        ({"scale": (0.8, 0.3)}, "data.augment.scale is (0.8, 0.3)"),
        ({"scale": (0.5, 1.5)}, "data.augment.scale is (0.5, 1.5)"),
        ({"ratio": (0.0, 1.0)}, "data.augment.ratio is (0.0, 1.0)"),
        ({"hflip": 1.5}, "data.augment.hflip is 1.5"),
        ({"vflip": -0.5}, "data.augment.vflip is -0.5"),
        ({"erase_prob": 2.0}, "data.augment.erase_prob is 2.0"),
        ({"mix_prob": 2.0}, "data.augment.mix_prob is 2.0"),
        ({"mix_switch_prob": 2.0}, "data.augment.mix_switch_prob is 2.0"),
        ({"color_jitter": -0.1}, "data.augment.color_jitter is -0.1"),
        ({"mixup": -0.1}, "data.augment.mixup is -0.1"),
        ({"cutmix": -0.1}, "data.augment.cutmix is -0.1"),
        ({"randaugment": "augmix-m3"}, "data.augment.randaugment is augmix-m3"),
        ({"randaugment": "rand-x9"}, "data.augment.randaugment is rand-x9"),
        ({"randaugment": "rand-m9.5"}, "data.augment.randaugment is rand-m9.5"),
    ],
)
def test_augmentation_that_does_not_exist_is_named(config: DataConfig, changes: dict[str, Any], expected: str) -> None:
    assert expected in complaint(replace(config, augment=replace(config.augment, **changes)))


def test_odd_lanes_are_fine_without_mixing(config: DataConfig) -> None:
    config = replace(config, global_batch_size=56, augment=AugmentConfig(mixup=0, cutmix=0))
    check_data(config, num_classes=10, world_size=1, accumulation=1)


def test_class_counts_that_do_not_fit_are_refused(config: DataConfig) -> None:
    for num_classes in (9, 11, 1000):
        message = complaint(config, num_classes=num_classes)
        assert f"model.num_classes is {num_classes} but {config.root} has 10 classes" in message
        assert "set model.num_classes to 10" in message
