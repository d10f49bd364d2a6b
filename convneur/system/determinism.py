"""Bits that come out the same each time."""

import os
from typing import Literal

Determinism = Literal["fast", "strict"]


def set_determinism(determinism: Determinism) -> None:
    """Chooses between PyTorch's usual algorithms and those that give the same bits each time.

    Call it before the process group is joined and before anything is on a GPU: NCCL and cuBLAS read their variables
    once. With strict, PyTorch refuses operators that have no such algorithm.
    """
    import torch  # takes seconds, and who only knows the configuration needn't wait for it

    strict = determinism == "strict"
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time
    if strict:
        torch.backends.cudnn.benchmark = False
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["NCCL_ALGO"] = "Ring"
