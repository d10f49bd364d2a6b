"""The families of backbones, and the one place where a backbone is constructed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convneur.data.errors import InputError
from convneur.models.backbone import Backbone, Model
from convneur.models.convneur.config import OWN, SMALLEST_IMAGE, ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.models.convneur.overflow import check_memories


@dataclass(frozen=True)
class Family:
    """Backbones that one function builds.

    Attributes:
        build: a backbone with its classifier and initial weights, drawn from torch's generator.
        smallest_image: pixels a side that they take at least.
        check: what is to be refused of a model with its initial weights, for images of so many pixels a side, by an
            InputError; None for nothing.
    """

    build: Callable[[ModelConfig], Backbone]
    smallest_image: int = 1
    check: Callable[[Any, int], None] | None = None


FAMILIES = {OWN: Family(ConvNeur, SMALLEST_IMAGE, check_memories)}
"""By what stands before the colon in `model.variant`; ConvNeur's variants have none."""


def family_of(config: ModelConfig) -> Family:
    """Who builds a model; InputError where there is no such family."""
    if config.family not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise InputError(f"model.variant is {config.variant!r}: no family {config.family!r}, expected one of {known}")
    return FAMILIES[config.family]


def build_model(config: ModelConfig) -> Backbone:
    """A backbone with its classifier and initial weights, drawn from torch's generator."""
    return family_of(config).build(config)


def check_initial(model: Model, config: ModelConfig, image_size: int) -> None:
    """Raises InputError where a model with its initial weights isn't fit for images of `image_size` pixels a side."""
    if check := family_of(config).check:
        check(model, image_size)
