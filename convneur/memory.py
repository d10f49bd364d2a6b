"""Chunked neural memory: the global branch of ConvNeur (paper, section "Chunked Neural Memory Aggregation").

Shape legend: B images, N tokens (H*W in raster order), L tokens a chunk, T = ceil(N / L) chunks, d memory width,
h = 4d hidden width of the memory MLP.

The memory is a two-layer MLP, M(x) = GELU(x W1) W2, whose weights are written while the image is read: after
every chunk they take one step of momentum gradient descent on the squared error of recalling values from keys.
For such an MLP the gradient has a closed form, so the inner loop is plain tensor algebra and the outer training
needs only first-order autograd.

Widths and depths are not in the paper: `convneur.model` says how they were derived.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ReadOrder = Literal["before_update", "after_update", "final_state"]
HIDDEN_RATIO = 4


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


def gelu_and_derivative(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x) = x Phi(x) and its derivative Phi(x) + x phi(x), sharing the one erf."""
    cdf = 0.5 * (1.0 + torch.erf(x * 0.5**0.5))
    pdf = torch.exp(-0.5 * x * x) * (2.0 * torch.pi) ** -0.5
    return x * cdf, cdf + x * pdf


def retrieve(state: MemoryState, q: Tensor) -> Tensor:
    """y_t = M(q_t): reads (B, L, d) queries from the memory."""
    return F.gelu(q @ state.w1) @ state.w2


class UpdateGenerator(nn.Linear):
    """Turns a chunk's surprise into its step size, momentum and decay (paper: "learnable update generator")."""

    def __init__(self, dim: int, inner_lr: float) -> None:
        super().__init__(dim, 3 * dim)
        self.inner_lr = inner_lr

    def forward(self, surprise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps the surprise (B, d) to theta in (0, inner_lr), eta in (0, 1) and alpha in (0, 1), each (B, d)."""
        theta, eta, alpha = super().forward(surprise).sigmoid().chunk(3, dim=-1)
        return self.inner_lr * theta, eta, alpha


def update(state: MemoryState, k: Tensor, v: Tensor, generator: UpdateGenerator) -> MemoryState:
    """M_t = U(M_{t-1}, grad loss_t): writes one chunk of keys and values, each (B, L, d).

    loss_t = mean over the chunk's tokens of |M_{t-1}(k) - v|^2, and its gradient in closed form:
    with a = k W1, u = GELU(a), e = u W2 - v and g = 2 e / L,
        dloss/dW2 = u^T g            (h, d)
        dloss/dW1 = k^T ((g W2^T) * GELU'(a))   (d, h)
    The per-channel factors act on the d axis: rows of W1, columns of W2.
    """
    u, du = gelu_and_derivative(k @ state.w1)
    e = u @ state.w2 - v
    theta, eta, alpha = generator(e.square().mean(dim=-2))

    g = e * (2.0 / k.shape[-2])
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


class NeuralMemory(nn.Module):
    """Maps tokens (B, N, d) to context (B, N, d) by reading and writing a memory chunk by chunk.

    The state and its gradients are kept in float32 (float64 for float64 tokens) whatever autocast is on: the
    state is a running sum over up to hundreds of chunks, which half precision would round away.
    """

    def __init__(self, dim: int, config: MemoryConfig = MemoryConfig()) -> None:
        super().__init__()
        if config.chunk_length < 1:
            raise ValueError(f"chunk_length must be at least 1, got {config.chunk_length}")
        self.config = config
        self.qkv = nn.Linear(dim, 3 * dim)
        self.w1 = nn.Parameter(torch.empty(dim, HIDDEN_RATIO * dim))
        self.w2 = nn.Parameter(torch.empty(HIDDEN_RATIO * dim, dim))
        self.update_generator = UpdateGenerator(dim, config.inner_lr)
        nn.init.normal_(self.w1, std=dim**-0.5)
        nn.init.normal_(self.w2, std=(HIDDEN_RATIO * dim) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        with torch.autocast(tokens.device.type, enabled=False):
            q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
            return self.aggregate(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)

    def aggregate(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The retrieve-update loop over chunks; q, k, v are (B, N, d). Updates that nothing reads are not made."""
        state = MemoryState(self.w1, self.w2)
        chunks = list(zip(*(x.split(self.config.chunk_length, dim=1) for x in (q, k, v)), strict=True))
        outputs = []
        for t, (q_t, k_t, v_t) in enumerate(chunks):
            match self.config.read:
                case "before_update":
                    outputs.append(retrieve(state, q_t))
                    if t + 1 < len(chunks):
                        state = update(state, k_t, v_t, self.update_generator)
                case "after_update":
                    state = update(state, k_t, v_t, self.update_generator)
                    outputs.append(retrieve(state, q_t))
                case "final_state":
                    state = update(state, k_t, v_t, self.update_generator)
        if self.config.read == "final_state":
            return retrieve(state, q)
        return torch.cat(outputs, dim=1)
