"""Chunked neural memory: the global branch of ConvNeur (paper, section "Chunked Neural Memory Aggregation").

Shape legend: B images, N tokens (H*W in raster order), L tokens a chunk, T = ceil(N / L) chunks, d memory width,
h = 4d hidden width of the memory MLP.

The memory is a two-layer MLP, M(x) = GELU(x W1) W2, whose weights are written while the image is read: after
every chunk they take one step of momentum gradient descent on the squared error of recalling values from keys.
For such an MLP the gradient has a closed form, so the inner loop is plain tensor algebra and the outer training
needs only first-order autograd.

This file is the method as the paper states it, in plain differentiable operations.
`convneur.ops.memory.operator` computes the same function faster.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convneur.ops.memory.reading import ReadOrder, steps
from convneur.ops.precision import own_precision

# Surprise (B, d) -> theta, eta and alpha, each (B, d).
Generator = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


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
