"""The one place where a backbone is constructed, and where what is special about a family of them is known."""

from convneur.models.backbone import Backbone, Model
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.models.convneur.overflow import check_memories


def build_model(config: ModelConfig) -> Backbone:
    """A backbone with its classifier and initial weights, drawn from torch's generator."""
    return ConvNeur(config)


def check_initial(model: Model, image_size: int) -> None:
    """Raises InputError where a model with its initial weights makes of an image of noise what isn't finite."""
    if isinstance(model, ConvNeur):
        check_memories(model, image_size)
