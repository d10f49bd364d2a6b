"""Where autocast must not reach."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on x's device, so that arithmetic stays in the precision of the tensors themselves.

    A graph that is being exported knows no autocast, and can't be saved with a switch in it. Nor does the meta device,
    which only tells shapes.
    """
    if x.is_meta or torch.compiler.is_exporting():
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
