"""What a global branch does with positions: the neural memory, and the alternatives the paper compares it with.

A mixer maps (B, H, W, d) to (B, H, W, d) for any H x W. `GlobalBranch` in branches.py puts each of them into the same
frame: projection C -> d, LayerNorm, mixer, projection d -> C. The paper names the alternatives and their cost and no
more; widths are chosen to come near that cost (`WIDTH_RATIOS` in config.py).

Shape legend: B images, H x W positions, N = H*W tokens in raster order, L tokens a chunk, d bottleneck width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from convneur.models.convneur.config import MemoryConfig, MixerKind
from convneur.models.convneur.memory import HIDDEN_RATIO, NeuralMemory, UpdateGenerator
from convneur.ops.memory.equations import MemoryState, retrieve, update
from convneur.ops.precision import own_precision


@register_notrace_module
class MemoryMixer(nn.Module):
    """Chunked neural memory, the paper's own; `convneur.ops.memory.equations` explains it."""

    def __init__(self, dim: int, config: MemoryConfig) -> None:
        super().__init__()
        self.memory = NeuralMemory(dim, config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        return self.memory(x)


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., ECCV 2018, arXiv 1807.06521): weights channels, then positions.

    Channels by sigmoid(MLP(mean over positions) + MLP(max over positions)), one MLP d -> d/16 -> d for both;
    positions by sigmoid(7x7 convolution of the mean and the max over channels).
    """

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, dim // reduction)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        x = x * (self.mlp(x.mean((1, 2))) + self.mlp(x.amax((1, 2)))).sigmoid()[:, None, None]
        pooled = torch.stack([x.mean(-1), x.amax(-1)], dim=1)  # (B, 2, H, W)
        return x * self.conv(pooled).sigmoid().permute(0, 2, 3, 1)


class NonLocal(nn.Module):
    """Non-local operation, embedded Gaussian (Wang et al., CVPR 2018, arXiv 1711.07971): unscaled dense attention.

    y_i = sum_j softmax_j(theta(x_i) . phi(x_j)) g(x_j); the frame's projection d -> C is its W_z.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.theta_phi_g = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        theta, phi, g = self.theta_phi_g(x.flatten(1, 2)).unsqueeze(1).chunk(3, dim=-1)  # one head
        return F.scaled_dot_product_attention(theta, phi, g, scale=1.0).view_as(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions (Vaswani et al., 2017, arXiv 1706.03762), heads of about 32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = math.gcd(dim, max(1, dim // 32))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view_as(x)


def quad_shift(x: Tensor) -> Tensor:
    """Moves a quarter of the channels by one position each to the right, left, down and up; zeros enter. NHWC.

    Q-shift of Vision-RWKV (arXiv 2403.02308); channels beyond four whole quarters stay.
    """
    right, left, down, up, rest = torch.split(x, [x.shape[-1] // 4] * 4 + [x.shape[-1] % 4], dim=-1)
    return torch.cat(
        [
            F.pad(right[:, :, :-1], (0, 0, 1, 0)),
            F.pad(left[:, :, 1:], (0, 0, 0, 1)),
            F.pad(down[:, :-1], (0, 0, 0, 0, 1, 0)),
            F.pad(up[:, 1:], (0, 0, 0, 0, 0, 1)),
            rest,
        ],
        dim=-1,
    )


def bidirectional_wkv(decay: Tensor, bonus: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV of Vision-RWKV (arXiv 2403.02308): a softmax whose logits fall with the distance |t - i|.

        y_t = sum_i exp(a_ti) v_i / sum_i exp(a_ti),   a_ti = k_i - (|t - i| - 1) decay / N, and a_tt = k_t + bonus / N

    decay and bonus are (d,), k and v (B, N, d). O(N): the decay over the whole sequence is exp(-decay), so what lies
    before and after a token are two cumulative sums of exp(k_i +- i decay / N), scaled by the largest of them; no term
    that matters underflows while |decay| plus the range of k stays below 80.
    """
    n = k.shape[1]
    step = decay / n
    slope = torch.arange(n, device=k.device, dtype=k.dtype)[:, None] * step  # (N, d)

    def before(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sum_{i<t} exp(a_ti) v_i, the same without v_i, both relative to exp(scale), and that scale."""
        logits = k + slope
        peak = logits.amax(1, keepdim=True)
        weights = (logits - peak).exp()
        total_v, total = (F.pad(x[:, :-1], (0, 0, 1, 0)).cumsum(1) for x in (weights * v, weights))
        return total_v, total, peak - slope + step

    past_v, past, past_scale = before(k, v)
    future_v, future, future_scale = (x.flip(1) for x in before(k.flip(1), v.flip(1)))
    own_scale = k + bonus / n
    scale = torch.maximum(torch.maximum(past_scale, future_scale), own_scale)
    past_weight, future_weight, own_weight = ((s - scale).exp() for s in (past_scale, future_scale, own_scale))
    numerator = past_weight * past_v + future_weight * future_v + own_weight * v
    return numerator / (past_weight * past + future_weight * future + own_weight)


class SpatialMix(nn.Module):
    """Spatial mix of Vision-RWKV (arXiv 2403.02308): linear attention along the raster order, in both directions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix_rkv = nn.Parameter(torch.full((3, dim), 0.5))
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.decay = nn.Parameter(torch.zeros(dim))
        self.bonus = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        shifted = quad_shift(x)
        r, k, v = (shifted + mix * (x - shifted) for mix in self.mix_rkv)
        r, k, v = self.receptance(r).sigmoid(), self.key(k), self.value(v)
        with own_precision(x):  # exponentials and long sums
            parts = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (self.decay, self.bonus, k, v))
            decay, bonus, k, v = parts
            y = bidirectional_wkv(decay, bonus, k.flatten(1, 2), v.flatten(1, 2)).view_as(v)
        return self.out(r * self.norm(y.to(r.dtype)))


@register_notrace_module
class IRRWKV(nn.Module):
    """Inverted residual around a spatial mix: the GLSP block of RWKV-UNet (arXiv 2501.08458).

    Expand d -> 3d, spatial mix, 5x5 depthwise convolution, project 3d -> d; a residual around each of the last two
    and around the whole. LayerNorm stands where the source has BatchNorm, whose running statistics a sharded engine
    would have to broadcast.
    """

    def __init__(self, dim: int, expansion: int = 3) -> None:
        super().__init__()
        wide = expansion * dim
        self.expand = nn.Sequential(nn.Linear(dim, wide), nn.LayerNorm(wide), nn.SiLU())
        self.spatial_mix = SpatialMix(wide)
        self.norm = nn.LayerNorm(wide)
        self.dwconv = nn.Conv2d(wide, wide, kernel_size=5, padding=2, groups=wide)
        self.project = nn.Linear(wide, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        y = self.expand(x)
        y = y + self.norm(self.spatial_mix(y))
        y = y + F.silu(self.dwconv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.project(y)


@register_notrace_module
class Titans(nn.Module):
    """Titans, memory as context (Behrouz et al., 2025, arXiv 2501.00663, section 4.1), over segments of L tokens.

    For segment S_t, with P learned tokens that persist over segments and images:
        h_t = M_{t-1}(q(S_t))                        what the memory knows about the segment
        y_t = Attention([persistent | h_t | S_t])    all to all, since an image has no direction to be causal in
        M_t = U(M_{t-1}; k(y_t), v(y_t))             the same update as in the neural memory
        o_t = y_t * sigmoid(Norm(M_t(q(y_t))))       for the tokens of S_t
    """

    def __init__(self, dim: int, config: MemoryConfig, persistent: int = 4) -> None:
        super().__init__()
        self.chunk_length = config.chunk_length
        self.persistent_tokens = nn.Parameter(0.02 * torch.randn(persistent, dim))
        self.attention = SelfAttention(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.w1 = nn.Parameter(dim**-0.5 * torch.randn(dim, HIDDEN_RATIO * dim))
        self.w2 = nn.Parameter((HIDDEN_RATIO * dim) ** -0.5 * torch.randn(HIDDEN_RATIO * dim, dim))
        self.update_generator = UpdateGenerator(dim, config.inner_lr)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H, W, d)."""
        with own_precision(x):  # the memory is a running sum
            return self._read_and_write(x.to(self.w1.dtype).flatten(1, 2)).view_as(x)

    def _read_and_write(self, tokens: Tensor) -> Tensor:
        persistent = self.persistent_tokens.expand(tokens.shape[0], -1, -1)
        state = MemoryState(self.w1, self.w2)
        outputs = []
        for segment in torch.split(tokens, self.chunk_length, dim=1):
            context = retrieve(state, F.normalize(self.query(segment), dim=-1))
            y = self.attention(torch.cat([persistent, context, segment], dim=1)[:, None])[:, 0]
            k, v = self.key_value(y).chunk(2, dim=-1)
            state = update(state, F.normalize(k, dim=-1), v, self.update_generator)
            y = y[:, -segment.shape[1] :]
            outputs.append(y * self.norm(retrieve(state, F.normalize(self.query(y), dim=-1))).sigmoid())
        return torch.cat(outputs, dim=1)


# How each of them is made, given its width d and the settings of the memory that it may contain.
MIXERS: dict[MixerKind, Callable[[int, MemoryConfig], nn.Module]] = {
    "neural_memory": MemoryMixer,
    "cbam": lambda dim, _: CBAM(dim),
    "non_local": lambda dim, _: NonLocal(dim),
    "self_attention": lambda dim, _: SelfAttention(dim),
    "ir_rwkv": lambda dim, _: IRRWKV(dim),
    "titans": Titans,
}
