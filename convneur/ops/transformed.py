"""When PyTorch's own operations have to do the work, because something transforms them."""

import torch


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work (vmap, grad, jvp and their like), or forward-mode differentiation.

    They know PyTorch's operations, while its Python interface to custom ones has no hook for `grad` and `jvp`.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
