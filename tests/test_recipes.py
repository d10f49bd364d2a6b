"""Recipes against timm's own builders, which their sources use, given the settings of those sources."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from places import CONFIGS
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from convneur.config import Config, load_config
from convneur.data.keys import libraries_restored, seed_libraries
from convneur.data.views.transforms import EvalTransform, TrainTransform
from convneur.engine.config import OptimizerConfig, peak_lr
from convneur.engine.optimizer import build_optimizer, build_schedule
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.tasks.mixing import DeviceTransform

STEPS = 10  # an epoch

# By the names of timm's arguments. From DeiT's and ConvNeXt's main.py, datasets.py and utils.py, and timm's gist.
SOURCES: dict[str, dict[str, Any]] = {
    "deit300": {
        "batch": 1024,
        "optimizer": {"opt": "adamw", "lr": 5e-4 * 1024 / 512, "weight_decay": 0.05, "eps": 1e-8},
        "schedule": {"num_epochs": 300, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5},
        "transform": {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "interpolation": "bicubic"},
        "erasing": {"probability": 0.25, "mode": "pixel"},
        "mixing": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1},
        "ema": 0.99996,
    },
    "convnext300": {
        "batch": 4096,
        "optimizer": {"opt": "adamw", "lr": 4e-3, "weight_decay": 0.05, "eps": 1e-8},
        "schedule": {"num_epochs": 280, "warmup_epochs": 20, "warmup_lr": 0.0, "min_lr": 1e-6, "warmup_prefix": True},
        "transform": {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "interpolation": "bicubic"},
        "erasing": {"probability": 0.25, "mode": "pixel"},
        "mixing": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1},
        "ema": 0.9999,
    },
    "small600": {  # what the gist has is its own; the rest is DeiT's
        "batch": 320 * 4,
        "optimizer": {"opt": "adamw", "lr": 5e-4 * 1280 / 512, "weight_decay": 0.05, "eps": 1e-8},
        "schedule": {"num_epochs": 600, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5},
        "transform": {"auto_augment": "rand-m8-inc1-mstd101", "color_jitter": None, "interpolation": "bicubic"},
        "erasing": {"probability": 0.25, "mode": "pixel"},
        "mixing": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1},
        "ema": 0.99996,
    },
}
recipes = pytest.mark.parametrize("name", SOURCES)


def recipe(name: str) -> Config:
    """A recipe as it is used: after a variant's own configuration."""
    return load_config([CONFIGS / "m4.yaml", CONFIGS / "recipes" / f"{name}.yaml"])


def optimizer(config: Config, model: ConvNeur) -> torch.optim.Optimizer:
    return build_optimizer(model, config.optimizer, "torch", config.data.global_batch_size, offload=False)


def test_every_recipe_is_compared_and_every_variant_has_one() -> None:
    assert {path.stem for path in (CONFIGS / "recipes").glob("*.yaml")} == set(SOURCES)
    for path in CONFIGS.glob("[nm]?.yaml"):
        assert load_config([path]) == load_config([CONFIGS / "recipes" / "deit300.yaml", path])


@recipes
@pytest.mark.parametrize("branch", ["neural_memory", "titans"])
def test_optimizer_groups(name: str, branch: Any) -> None:
    source, config = SOURCES[name], recipe(name)
    model = ConvNeur(ModelConfig("n1", num_classes=10, branch=branch))
    names = {parameter: key for key, parameter in model.named_parameters()}

    def settings(optimizer: torch.optim.Optimizer) -> dict[str, tuple[object, ...]]:
        return {
            names[p]: (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"])
            for group in optimizer.param_groups
            for p in group["params"]
        }

    ours = settings(optimizer(config, model))
    assert ours == settings(create_optimizer_v2(model, **source["optimizer"]))
    assert ours.keys() == set(names.values())
    assert {key for key, (*_, decay) in ours.items() if not decay} == {
        key for p, key in names.items() if p.ndim == 1 or key.endswith("persistent_tokens")
    }
    assert config.data.global_batch_size == source["batch"]
    assert config.data.repeats == (3 if name == "deit300" else 1)
    assert config.optimizer.clip_grad == 0
    assert config.train.ema_decay == source["ema"]


@recipes
def test_learning_rate_at_every_step(name: str) -> None:
    source, config = SOURCES[name], recipe(name)
    ours, theirs, by_epoch = (optimizer(config, ConvNeur(ModelConfig("n1", num_classes=10))) for _ in range(3))
    schedule = build_schedule(ours, config.schedule, STEPS)
    reference, _ = create_scheduler_v2(theirs, **source["schedule"], step_on_epochs=False, updates_per_epoch=STEPS)
    stairs, _ = create_scheduler_v2(by_epoch, **source["schedule"])
    for step in range(config.schedule.epochs * STEPS):
        schedule.step_update(step)
        reference.step_update(step)
        rate = ours.param_groups[0]["lr"]
        assert rate == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        if step % STEPS == 0:  # DeiT sets it once an epoch
            stairs.step(step // STEPS)
            assert rate == pytest.approx(by_epoch.param_groups[0]["lr"], rel=1e-9)
    assert rate == pytest.approx(config.schedule.min_lr, rel=0.02)


def test_scaling_with_the_batch() -> None:
    linear = OptimizerConfig(lr=5e-4, lr_batch_size=512)
    assert peak_lr(linear, 4096) == pytest.approx(4e-3)
    assert peak_lr(replace(linear, lr_scaling="sqrt"), 2048) == pytest.approx(1e-3)
    assert peak_lr(replace(linear, lr_batch_size=0), 4096) == 5e-4


@recipes
def test_transforms(name: str) -> None:
    source, data = SOURCES[name], recipe(name).data
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 400, 3), dtype=np.uint8))
    theirs = create_transform(224, is_training=True, use_prefetcher=True, **source["transform"])
    differing = 0
    for transform, reference in ((TrainTransform(data), theirs), (EvalTransform(data), eval_like_theirs())):
        for seed in range(8):
            views = []
            for part in (transform, reference):
                with libraries_restored():
                    seed_libraries(seed)
                    views.append(torch.as_tensor(np.asarray(part(image))))
            assert torch.equal(*views)
            differing += not torch.equal(views[0], torch.as_tensor(np.asarray(transform(image))))
    assert differing >= 8  # the training transforms are random


def eval_like_theirs() -> Any:
    """The centre of 224 pixels of 256, in torchvision's words as DeiT and ConvNeXt have it."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

    return Compose([Resize(256, interpolation=InterpolationMode.BICUBIC), CenterCrop(224), PILToTensor()])


@recipes
def test_erasing_and_mixing_draw_as_timm(name: str) -> None:
    source, config = SOURCES[name], recipe(name)
    device = torch.device("cpu")
    smoothing = config.train.label_smoothing
    ours = DeviceTransform(config.data, num_classes=1000, label_smoothing=smoothing, seed=0, device=device)
    assert vars(ours._erase) == vars(RandomErasing(**source["erasing"], device=device))
    mixup, theirs = ours._mixup, Mixup(**source["mixing"], num_classes=1000)
    assert mixup is not None
    draws = []
    for mix in (mixup, theirs):
        random.seed(0)
        np.random.seed(0)
        draws.append([mix._params_per_batch() for _ in range(2000)])
    assert draws[0] == draws[1]
    # Beta(0.8, 0.8) and Beta(1, 1) have mean 1/2 and variances 0.0962 and 0.0833; half of the draws are cutmix.
    kinds = np.array([cutmix for _, cutmix in draws[0]])
    lam = np.array([lam for lam, _ in draws[0]])
    assert kinds.mean() == pytest.approx(0.5, abs=0.05)
    assert [lam[kinds].var(), lam[~kinds].var()] == pytest.approx([1 / 12, 1 / 4 / 2.6], abs=0.01)
    assert vars(theirs) == vars(mixup)
