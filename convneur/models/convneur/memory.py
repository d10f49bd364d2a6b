"""The neural memory as a module: its parameters, and the choice of what computes it.

Shape legend: B images, N tokens (H*W in raster order), d memory width.

`convneur.ops.memory.equations` is the method. Widths and depths are not in the paper:
`convneur.models.convneur.config` says how they were derived.
"""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from convneur.models.convneur.config import MemoryConfig
from convneur.ops.linear import channel_linear
from convneur.ops.memory import equations, operator, scan
from convneur.ops.memory.equations import MemoryState, update_factors
from convneur.ops.memory.reading import updates
from convneur.ops.transformed import is_transformed

HIDDEN_RATIO = 4


class UpdateGenerator(nn.Linear):
    """`update_factors` as a module, for memories that are not a `NeuralMemory`."""

    def __init__(self, dim: int, inner_lr: float) -> None:
        super().__init__(dim, 3 * dim)
        self.inner_lr = inner_lr

    def forward(self, surprise: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Maps the surprise (B, d) to step size, momentum and decay."""
        return update_factors(surprise, self.weight, self.bias, self.inner_lr)


class NeuralMemory(nn.Module):
    """Maps tokens (B, N, d) to context (B, N, d) by reading and writing a memory chunk by chunk.

    All parameters are the module's own, none belongs to a child: the fast implementations take them all at once, and
    DeepSpeed's ZeRO stage 3 gathers what belongs to the module that is called.
    """

    implementation: Literal["auto", "plain", "scan", "fused"] = "auto"

    def __init__(self, dim: int, config: MemoryConfig | None = None) -> None:
        super().__init__()
        config = config or MemoryConfig()
        if config.chunk_length < 1:
            raise ValueError(f"chunk_length must be at least 1, got {config.chunk_length}")
        self.dim = dim
        self.config = config
        self.settings = (config.chunk_length, config.inner_lr, config.read)
        self.qkv_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.qkv_bias = nn.Parameter(torch.zeros(3 * dim))
        self.w1 = nn.Parameter(torch.empty(dim, HIDDEN_RATIO * dim))
        self.w2 = nn.Parameter(torch.empty(HIDDEN_RATIO * dim, dim))
        self.generator_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.generator_bias = nn.Parameter(torch.zeros(3 * dim))
        trunc_normal_(self.qkv_weight, std=0.02)
        trunc_normal_(self.generator_weight, std=0.02)
        nn.init.normal_(self.w1, std=dim**-0.5)
        nn.init.normal_(self.w2, std=(HIDDEN_RATIO * dim) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) or, row by row, (B, H, W, d) -> the same shape."""
        if torch.jit.is_scripting():  # TorchScript knows no dataclasses, and leaves out an `else` but not what follows
            qkv = F.linear(tokens, self.qkv_weight, self.qkv_bias).flatten(1, -2)
            weights = self.w1, self.w2, self.generator_weight, self.generator_bias
            keep = torch.is_grad_enabled()
            return torch.ops.convneur.neural_memory(qkv, *weights, *self.settings, keep)[0].view_as(tokens)
        else:
            return self.recurrence(self.project(tokens)).view_as(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values (B, N or H, W, 3d) of tokens; queries alone where nothing will be written."""
        return channel_linear(tokens, *self.projection(math.prod(tokens.shape[1:-1])))

    def projection(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the layer that `project` applies to so many tokens."""
        count = updates(self.config.read, tokens, self.config.chunk_length)
        any_size = torch.compiler.is_exporting() or torch.jit.is_tracing() or self.implementation == "scan"
        if any_size or count > 0:
            return self.qkv_weight, self.qkv_bias
        bias = self.qkv_bias[: self.dim]
        if torch.is_grad_enabled():
            # A gradient of zero, instead of none, spares data-parallel wrappers and optimizers parameters that take
            # part at some resolutions only.
            bias = bias + 0.0 * (self.generator_weight.sum() + self.generator_bias.sum())
        return self.qkv_weight[: self.dim], bias

    def recurrence(self, qkv: Tensor) -> Tensor:
        """The loop over chunks, (B, N or H, W, 3d) -> (B, N, d), by the fastest implementation for these tokens."""
        config, state = self.config, MemoryState(self.w1, self.w2)
        if qkv.shape[-1] == self.dim:  # nothing is written: an MLP like any other, in whatever precision autocast likes
            hidden = F.gelu(channel_linear(F.normalize(qkv, dim=-1), self.w1.T))
            return channel_linear(hidden, self.w2.T).flatten(1, -2).to(qkv.dtype)
        qkv = qkv.flatten(1, -2)
        implementation = self.implementation
        if implementation in ("auto", "fused") and is_transformed():
            implementation = "plain"
        if implementation == "auto" and torch.onnx.is_in_onnx_export():
            implementation = "scan" if isinstance(qkv.shape[1], torch.SymInt) else "plain"
        if implementation in ("plain", "scan"):
            generator = partial(
                update_factors, weight=self.generator_weight, bias=self.generator_bias, inner_lr=config.inner_lr
            )
            run = scan.recurrence if implementation == "scan" else equations.recurrence
            return run(qkv, state, generator, config.chunk_length, config.read)
        return operator.recurrence(
            qkv,
            self.w1,
            self.w2,
            self.generator_weight,
            self.generator_bias,
            config.chunk_length,
            config.inner_lr,
            config.read,
            kernels=implementation == "auto",
        )
