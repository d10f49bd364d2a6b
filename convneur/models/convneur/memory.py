"""Chunked neural memory: the global branch of ConvNeur (paper, section "Chunked Neural Memory Aggregation").

Shape legend: B images, N tokens (H*W in raster order), L tokens a chunk, T = ceil(N / L) chunks, d memory width,
h = 4d hidden width of the memory MLP.

The memory is a two-layer MLP, M(x) = GELU(x W1) W2, whose weights are written while the image is read: after
every chunk they take one step of momentum gradient descent on the squared error of recalling values from keys.
For such an MLP the gradient has a closed form, so the inner loop is plain tensor algebra and the outer training
needs only first-order autograd.

This file is the method as the paper states it, in plain differentiable operations, and the module around it.
`convneur.ops.memory.operator` computes the same function faster; `NeuralMemory.recurrence` picks.

Widths and depths are not in the paper: `convneur.models.convneur.model` says how they were derived.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from convneur.ops.linear import channel_linear
from convneur.ops.memory import operator
from convneur.ops.memory.reading import ReadOrder, steps, updates
from convneur.ops.precision import own_precision
from convneur.ops.transformed import is_transformed

HIDDEN_RATIO = 4

# Surprise (B, d) -> theta, eta and alpha, each (B, d).
Generator = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of the neural memory.

    Attributes:
        chunk_length: tokens a chunk, L (paper: 196 for classification, 4096 for detection).
        inner_lr: scale of the inner step size theta (paper: 1 for classification, 1e-3 for detection).
        read: what chunk t reads. "before_update" (paper): the state left by chunk t-1. "after_update": the state that
            chunk t itself just wrote. "final_state": the state after the last chunk, so that every position sees the
            whole image.
    """

    chunk_length: int = 196
    inner_lr: float = 1.0
    read: ReadOrder = "before_update"


class MemoryState(NamedTuple):
    """Fast weights and their velocities; the leading axis is B, or absent while all images still share M_0."""

    w1: Tensor  # (B, d, h)
    w2: Tensor  # (B, h, d)
    z1: Tensor | None = None  # velocity of w1; None stands for zero
    z2: Tensor | None = None


def update_factors(surprise: Tensor, weight: Tensor, bias: Tensor, inner_lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Turns a chunk's surprise into its step size, momentum and decay (paper: "learnable update generator").

    Maps (B, d), by a linear layer d -> 3d, to theta in (0, inner_lr), eta in (0, 1) and alpha in (0, 1), each (B, d).
    """
    weight, bias = weight.to(surprise.dtype), bias.to(surprise.dtype)
    theta, eta, alpha = F.linear(surprise, weight, bias).sigmoid().chunk(3, dim=-1)
    return inner_lr * theta, eta, alpha


class UpdateGenerator(nn.Linear):
    """`update_factors` as a module, for memories that are not a `NeuralMemory`."""

    def __init__(self, dim: int, inner_lr: float) -> None:
        super().__init__(dim, 3 * dim)
        self.inner_lr = inner_lr

    def forward(self, surprise: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Maps the surprise (B, d) to step size, momentum and decay."""
        return update_factors(surprise, self.weight, self.bias, self.inner_lr)


def gelu_and_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x) = x Phi(x) and its derivative Phi(x) + x phi(x), sharing the one erf."""
    cdf = 0.5 * (1.0 + torch.erf(x * 0.5**0.5))
    pdf = torch.exp(-0.5 * x * x) * (2.0 * torch.pi) ** -0.5
    return x * cdf, cdf + x * pdf


def retrieve(state: MemoryState, q: Tensor) -> Tensor:
    """y_t = M(q_t): reads (B, L, d) queries from the memory."""
    return F.gelu(q @ state.w1) @ state.w2


def update(state: MemoryState, k: Tensor, v: Tensor, generator: Generator, count: Tensor | None = None) -> MemoryState:
    """M_t = U(M_{t-1}, grad loss_t): writes one chunk of keys and values, each (B, L, d).

    loss_t = mean over the chunk's tokens of |M_{t-1}(k) - v|^2, and its gradient in closed form:
    with a = k W1, u = GELU(a), e = u W2 - v and g = 2 e / L,
        dloss/dW2 = u^T g            (h, d)
        dloss/dW1 = k^T ((g W2^T) * GELU'(a))   (d, h)
    The per-channel factors act on the d axis: rows of W1, columns of W2. Where rows of zeros fill a chunk up, count
    is the number of its tokens, L.
    """
    length = k.shape[-2] if count is None else count
    u, du = gelu_and_derivative(k @ state.w1)
    e = u @ state.w2 - v
    theta, eta, alpha = generator(e.square().sum(dim=-2) / length)

    g = e * (2.0 / length)
    grad_w2 = u.mT @ g
    grad_w1 = k.mT @ ((g @ state.w2.mT) * du)

    z1 = -theta[..., :, None] * grad_w1
    z2 = -theta[..., None, :] * grad_w2
    if state.z1 is not None and state.z2 is not None:
        z1 = z1 + eta[..., :, None] * state.z1
        z2 = z2 + eta[..., None, :] * state.z2
    w1 = (1.0 - alpha)[..., :, None] * state.w1 + z1
    w2 = (1.0 - alpha)[..., None, :] * state.w2 + z2
    return MemoryState(w1, w2, z1, z2)


def recurrence(qkv: Tensor, state: MemoryState, generator: Generator, chunk_length: int, read: ReadOrder) -> Tensor:
    """The retrieve-update loop over chunks: (B, N, 3d) queries, keys and values -> (B, N, d) context.

    Updates that nothing reads are not made. The state and all arithmetic on it are in float32 (float64 for float64
    tokens) whatever autocast is on: the state is a running sum over up to hundreds of chunks, which half precision
    would round away.
    """
    with own_precision(qkv):
        q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        state = state._replace(w1=state.w1.to(q.dtype), w2=state.w2.to(q.dtype))
        context = []
        for keys, queries in steps(read, qkv.shape[1], chunk_length):
            if queries.stop:
                context.append(retrieve(state, q[:, queries]))
            if keys.stop:
                state = update(state, k[:, keys], v[:, keys], generator)
        return torch.cat(context, dim=1).to(qkv.dtype)


class NeuralMemory(nn.Module):
    """Maps tokens (B, N, d) to context (B, N, d) by reading and writing a memory chunk by chunk.

    All parameters are the module's own, none belongs to a child: the fast implementations take them all at once, and
    DeepSpeed's ZeRO stage 3 gathers what belongs to the module that is called.
    """

    implementation: Literal["auto", "plain", "scan", "fused"] = "auto"

    def __init__(self, dim: int, config: MemoryConfig = MemoryConfig()) -> None:
        super().__init__()
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
            if implementation == "scan":
                from convneur.ops.memory import scan  # which builds on this module

                run = scan.recurrence
            else:
                run = recurrence
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
