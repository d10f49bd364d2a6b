"""ConvNeur under its names in timm's registry: `timm.create_model("convneur_m4", num_classes=10)`.

Keyword arguments are timm's (num_classes, in_chans, global_pool, drop_rate, drop_path_rate, features_only,
out_indices) or fields of `ModelConfig` (placement="none", memory=MemoryConfig(read="final_state")).
Nobody has published weights for these names, so pretrained=True fails.
"""

from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

__all__: list[str] = []  # register_model adds the names

# Spelled out, since config.py can't be imported here: its own import of timm is what runs this module.
VARIANT_NAMES = ("n1", "n2", "n3", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "m9")

default_cfgs = generate_default_cfgs(
    {
        f"convneur_{variant}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "min_input_size": (3, 32, 32),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.0",
            "classifier": "head.fc",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2603.19567",
            "paper_name": "Efficiency Follows Global-Local Decoupling",
        }
        for variant in VARIANT_NAMES
    }
)


def _build(variant: str, drop_path_rate: float = 0.0, **fields: Any) -> nn.Module:
    from convneur.models.convneur.config import ModelConfig
    from convneur.models.convneur.model import ConvNeur

    return ConvNeur(ModelConfig(variant, drop_path=drop_path_rate, **fields))


def _register(variant: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            partial(_build, variant),
            create.__name__,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
            **kwargs,
        )

    create.__name__ = create.__qualname__ = f"convneur_{variant}"
    create.__doc__ = f"ConvNeur-{variant.upper()}."
    globals()[create.__name__] = register_model(create)


for _variant in VARIANT_NAMES:
    _register(_variant)
