"""Where autocast must not reach."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on x's device, so that arithmetic stays in the precision of the tensors themselves.

    A graph that is being exported knows no autocast, and can't be saved with a switch in it.
    """
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(x.device.type, enabled=False)
