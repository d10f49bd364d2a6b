"""The methods that optimizer.name chooses from: what each keeps and needs, and whose code runs it. Loads no PyTorch.

A new one takes an entry here, its constructors in `convneur.engine.optimizer`, and its name in `OptimizerConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Implementation = Literal["torch", "deepspeed", "apex"]


@dataclass(frozen=True)
class Method:
    """What is to be known of a method besides its equations.

    Attributes:
        title: its name in a sentence.
        moments: float32 numbers that it keeps for every parameter.
        whole_tensors: whether a step is scaled by the norms of whole parameters.
        faster: what optimizer.implementation auto takes before PyTorch's own, best first, where it is there.
        offloaded: the same where the state is offloaded.
        extensions: what DeepSpeed compiles for it, by the type of device that the state is on; no other can run it.
    """

    title: str
    moments: int
    whole_tensors: bool
    faster: tuple[Implementation, ...]
    offloaded: tuple[Implementation, ...]
    extensions: Mapping[str, str]


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        # PyTorch's fused AdamW needs no compiler and is as fast as the others claim to be. DeepSpeed asks for its own
        # CPUAdam where it offloads.
        "adamw": Method(
            title="AdamW",
            moments=2,
            whole_tensors=False,
            faster=(),
            offloaded=("deepspeed",),
            extensions={"cpu": "cpu_adam", "cuda": "fused_adam"},
        ),
        # timm's, which runs on PyTorch, launches many small kernels.
        "lamb": Method(
            title="LAMB",
            moments=2,
            whole_tensors=True,
            faster=("apex", "deepspeed"),
            offloaded=(),
            extensions={"cuda": "fused_lamb"},
        ),
    }
)
