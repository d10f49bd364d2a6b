"""ConvNeur vision backbones and their distributed training.

Importing this package puts `convneur_n1` .. `convneur_m9` into timm's registry.
"""

import importlib
from types import ModuleType

import wrapt


@wrapt.when_imported("timm")
def _register_models(timm: ModuleType) -> None:
    """Waits for whoever wants to name a model, so that the command line and the data layer need not load timm."""
    importlib.import_module("convneur.models.convneur.timm_names")
