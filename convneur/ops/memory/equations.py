"""The method: chunked neural memory, equation by equation (paper, section "Chunked Neural Memory Aggregation").

A memory M is a small MLP that is written while an image is read. The image's tokens S, in raster order, are cut into
T chunks S_1 .. S_T of L tokens; the last one may be shorter. From each chunk come queries, keys and values,

    q_t = W_q S_t,   k_t = W_k S_t,   v_t = W_v S_t,   queries and keys scaled to length 1.                (1)

Keys are what values are to be recalled by. A chunk is answered first, and written then:

    M(x) = GELU(x W1) W2                                                          the memory              (2)
    y_t  = M_{t-1}(q_t)                                                           retrieve                (3)
    e_t  = M_{t-1}(k_t) - v_t                                                     what isn't recalled     (4)
    l_t  = mean over the chunk's tokens of |e_t|^2                                reconstruction loss     (5)
    s_t  = mean over the chunk's tokens of e_t^2, channel by channel              surprise                (6)
    (theta_t, eta_t, alpha_t) = sigmoid(W_g s_t + b_g)                            update generator        (7)
    Z_t  = eta_t Z_{t-1} - theta_t dl_t/dM                                        velocity                (8)
    M_t  = (1 - alpha_t) M_{t-1} + Z_t                                            update                  (9)

So a chunk that is hard to recall writes more. theta is the step size, scaled by a constant `inner_lr`; eta is the
momentum, alpha the decay. All three are vectors of d, and act on the axis of both weights that has d: rows of W1,
columns of W2. Z_0 is zero; M_0 is learned and shared by all images; from M_1 on every image has weights of its own.

The gradient in (8) has a closed form. With the hidden units a = k W1, u = GELU(a), and g = 2 e / L,

    dl/dW2 = u^T g,                                                                                       (10)
    dl/dW1 = k^T ((g W2^T) * GELU'(a)),                                                                   (11)

so the inner loop is plain tensor algebra, and training what is around it needs only first-order autograd.

The paper states M_t = U(M_{t-1}, dl_t/dM), with a learned generator of step size, momentum and decay; (6) to (9) are
this project's reading of that. The numbers of equations are this file's own.

Shapes: B images, N tokens, L tokens a chunk, d memory width, h hidden width. W1 is (d, h), W2 (h, d).

Everything here is made of PyTorch's differentiable operations, to be read and to be compared with. What computes the
same faster is chosen in `convneur.ops.memory.operator`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convneur.ops.memory.reading import ReadOrder, steps
from convneur.ops.precision import own_precision

# Surprise (B, d) -> theta, eta and alpha, each (B, d): equation (7).
Generator = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class MemoryState(NamedTuple):
    """M_t and Z_t; the leading axis is B, or absent while all images still share M_0."""

    w1: Tensor  # (B, d, h)
    w2: Tensor  # (B, h, d)
    z1: Tensor | None = None  # velocity of w1; None stands for zero
    z2: Tensor | None = None


def retrieve(state: MemoryState, q: Tensor) -> Tensor:
    """Reads queries (B, L, d) from the memory: equations (2) and (3)."""
    return F.gelu(q @ state.w1) @ state.w2


def update_factors(surprise: Tensor, weight: Tensor, bias: Tensor, inner_lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Turns a chunk's surprise into its step size, momentum and decay: equation (7).

    Maps (B, d), by a linear layer d -> 3d, to theta in (0, inner_lr), eta in (0, 1) and alpha in (0, 1), each (B, d).
    """
    weight, bias = weight.to(surprise.dtype), bias.to(surprise.dtype)
    theta, eta, alpha = F.linear(surprise, weight, bias).sigmoid().chunk(3, dim=-1)
    return inner_lr * theta, eta, alpha


def update(state: MemoryState, k: Tensor, v: Tensor, generator: Generator, count: Tensor | None = None) -> MemoryState:
    """Writes one chunk of keys and values, each (B, L, d), into the memory: equations (4) to (11).

    Where rows of zeros fill a chunk up, count is the number of its tokens, L.
    """
    length = k.shape[-2] if count is None else count
    u, du = gelu_and_derivative(k @ state.w1)
    e = u @ state.w2 - v  # (4)
    theta, eta, alpha = generator(e.square().sum(dim=-2) / length)  # (6), (7)

    g = e * (2.0 / length)
    grad_w2 = u.mT @ g  # (10)
    grad_w1 = k.mT @ ((g @ state.w2.mT) * du)  # (11)

    z1 = -theta[..., :, None] * grad_w1  # (8)
    z2 = -theta[..., None, :] * grad_w2
    if state.z1 is not None and state.z2 is not None:
        z1 = z1 + eta[..., :, None] * state.z1
        z2 = z2 + eta[..., None, :] * state.z2
    w1 = (1.0 - alpha)[..., :, None] * state.w1 + z1  # (9)
    w2 = (1.0 - alpha)[..., None, :] * state.w2 + z2
    return MemoryState(w1, w2, z1, z2)


def gelu_and_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x) = x Phi(x) and its derivative Phi(x) + x phi(x), sharing the one erf."""
    cdf = 0.5 * (1.0 + torch.erf(x * 0.5**0.5))
    pdf = torch.exp(-0.5 * x * x) * (2.0 * torch.pi) ** -0.5
    return x * cdf, cdf + x * pdf


def recurrence(qkv: Tensor, state: MemoryState, generator: Generator, chunk_length: int, read: ReadOrder) -> Tensor:
    """The loop over chunks: (B, N, 3d) queries, keys and values -> (B, N, d), what was retrieved, in the same order.

    `read` says which state a chunk's queries meet; "before_update" is the paper's, equation (3). Updates that nothing
    reads are not made. The state and all arithmetic on it are in float32 (float64 for float64 tokens) whatever
    autocast is on: the state is a running sum over up to hundreds of chunks, which half precision would round away.
    """
    with own_precision(qkv):
        q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)  # (1)
        state = state._replace(w1=state.w1.to(q.dtype), w2=state.w2.to(q.dtype))
        context = []
        for keys, queries in steps(read, qkv.shape[1], chunk_length):
            if queries.stop:
                context.append(retrieve(state, q[:, queries]))
            if keys.stop:
                state = update(state, k[:, keys], v[:, keys], generator)
        return torch.cat(context, dim=1).to(qkv.dtype)
