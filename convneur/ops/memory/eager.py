"""The neural memory's recurrence with its backward pass written by hand, in PyTorch: for any device and precision.

equations.py has the equations; this is the same function, faster, for three reasons:
- Only the states and the recall errors are kept for the backward pass. It recomputes everything of size (B, L, h),
  which costs 12 of 96 d^2 multiply-accumulates a token and less time than writing and reading it would.
- Images are taken in groups small enough for the cache, and every step works in the same few buffers.
- Constant factors ride along with matrix products, and GELU's first and second derivatives are evaluated once.

Shape legend: B images, b images of a group, N tokens, M written tokens, U updates, L tokens a chunk, n_k keys and n_q
queries of a step, d memory width, h hidden width. W2 is held transposed, so that a state is one tensor (2, B, d, h) and
the update factors scale the same axis of both weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from convneur.ops.memory.reading import ReadOrder, steps, updates, written_tokens

CACHE_BYTES_PER_THREAD = 2**20  # one (b, n, h) buffer gets half, the backward pass works in eight of them
LINE = 16  # numbers in a cache line
NORM_EPS = 1e-12  # as torch.nn.functional.normalize

_gelu, _gelu_backward = torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input


def _groups(scales: Tensor, hidden: int, chunk_length: int) -> list[slice]:
    """Images that are processed together: as many as fit the cache on a CPU, all of them elsewhere."""
    images, tokens = scales.shape[:2]
    size = max(images, 1)
    if scales.device.type == "cpu":
        threads = torch.get_num_threads()
        bytes_per_image = 2 * min(chunk_length, tokens) * hidden * scales.itemsize
        size = threads * max(1, CACHE_BYTES_PER_THREAD // bytes_per_image)
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


class _Scratch:
    """Buffers for the rows of a chunk, cut once for each number of rows from storage that all of them share."""

    def __init__(self, like: Tensor, images: int, lengths: set[int], widths: Sequence[int]) -> None:
        self.images, self.widths = images, widths
        self.storage = like.new_empty(images * max(lengths) * sum(widths) + LINE * len(widths))
        self.views = {rows: self._cut(rows) for rows in lengths}

    def _cut(self, rows: int) -> list[Tensor]:
        """One (b, rows, width) for every width."""
        views, end = [], 0
        for width in self.widths:
            size = self.images * rows * width
            views.append(self.storage[end : end + size].view(self.images, rows, width))
            end += -(-size // LINE) * LINE
        return views


def _by_step(sizes: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cuts every (b, N, ·) into the tokens of each step, some or none."""
    return [x[:, : sum(sizes)].split(list(sizes), dim=1) for x in tensors]


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _through_norm(x: Tensor, scale: Tensor, dx: Tensor, out: Tensor, buffer: Tensor) -> None:
    """Gradient of what times scale is x, a vector of length 1, from that of x; dx and the buffer are lost."""
    dx.addcmul_(x, torch.sum(torch.mul(x, dx, out=buffer), -1, keepdim=True), value=-1.0)
    torch.mul(dx, scale, out=out)


class _Factors:
    """What the update generator's sigmoids (..., 3d) stand for, in one operation each."""

    def __init__(self, like: Tensor, d: int, inner_lr: float) -> None:
        self.d = d
        coefficients = like.new_tensor([[-inner_lr, 1.0, -1.0], [0.0, 0.0, 1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
        self.scale, self.shift, self.slope_scale, self.slope_shift = coefficients.repeat_interleave(d, dim=1)

    def values(self, sigmoids: Tensor) -> tuple[Tensor, ...]:
        """-theta, eta and 1 - alpha, each (..., d, 1)."""
        return torch.addcmul(self.shift, sigmoids, self.scale).unflatten(-1, (3, self.d, 1)).unbind(-3)

    def slopes(self, sigmoids: Tensor) -> Tensor:
        """1 - sigmoid for theta and eta, sigmoid - 1 for alpha, (..., 3d)."""
        return torch.addcmul(self.slope_shift, sigmoids, self.slope_scale)


def reciprocal_norms(qkv: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """Those of queries and keys, (B, N, 2, 1), of tokens (B, N, 3d)."""
    query_and_key = qkv.unflatten(-1, (3, d))[:, :, :2]
    norms = torch.linalg.vector_norm(query_and_key, dim=-1, keepdim=True, dtype=dtype)
    return norms.clamp_min_(NORM_EPS).reciprocal_()


def forward(
    qkv: Tensor,
    start: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Context, states, surprises, factors, errors and scales, as operator.py's `neural_memory` returns them.

    Args:
        qkv: queries, keys and values (B, N, 3d).
        start: W1 and W2^T of M_0, (2, d, h).
        generator_weight: of the update generator, (3d, d).
        generator_bias: (3d,).
        chunk_length: L.
        inner_lr: scale of the inner step size.
        read: reading order.
        keep: whether to keep all states; otherwise there is room for two.
    """
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    n_keys, n_queries = zip(*(step.sizes for step in steps(read, tokens, chunk_length)), strict=True)
    lengths = {*n_keys, *n_queries} - {0}
    count = updates(read, tokens, chunk_length)
    parts = qkv.unflatten(-1, (3, d))
    scales = reciprocal_norms(qkv, d, start.dtype)
    decode = _Factors(scales, d, inner_lr)

    y = scales.new_empty(images, tokens, d)
    states = scales.new_empty(count if keep else min(count, 2), 2, 2, images, d, h)
    surprises = scales.new_empty(count, images, d)
    factors = scales.new_empty(count, images, 3 * d)
    errors = scales.new_empty(images, written_tokens(read, tokens, chunk_length), d)

    for group in _groups(scales, h, max(lengths)):
        b = group.stop - group.start
        scratch = _Scratch(scales, b, lengths, [d, d, h, h, h])
        (queries, keys, values), (of_queries, of_keys) = parts[group].unbind(2), scales[group].unbind(2)
        raw_q, scale_q, context = _by_step(n_queries, queries, of_queries, y[group])
        raw_k, scale_k, v, error = _by_step(n_keys, keys, of_keys, values, errors[group])
        state, surprise, sigmoids = states[:, :, :, group].unbind(), surprises[:, group].unbind(), factors[:, group]
        gradient = scales.new_empty(2, b, d, h)
        gradient1, gradient2 = gradient
        w, z = start.unsqueeze(1).expand(2, b, d, h), None
        for t, (n_k, n_q) in enumerate(zip(n_keys, n_queries, strict=True)):
            w1, w2 = w
            w2_transposed = w2.mT
            if n_q:
                q, out, a, u, _ = scratch.views[n_q]
                torch.mul(raw_q[t], scale_q[t], out=q)
                _gelu(torch.bmm(q, w1, out=a), out=u)
                context[t].copy_(torch.bmm(u, w2_transposed, out=out))
            if not n_k:
                continue

            k, e, a, u, back = scratch.views[n_k]
            torch.mul(raw_k[t], scale_k[t], out=k)
            _gelu(torch.bmm(k, w1, out=a), out=u)
            torch.bmm(u, w2_transposed, out=e).sub_(v[t])
            if keep:
                error[t].copy_(e)
            torch.sum(torch.mul(e, e, out=back[..., :d]), 1, out=surprise[t]).mul_(1.0 / n_k)
            torch.addmm(generator_bias, surprise[t], generator_weight.T, out=sigmoids[t]).sigmoid_()
            rate, eta, retention = decode.values(sigmoids[t])
            _gelu_backward(torch.bmm(e, w2, out=back), a, grad_input=back)
            torch.bmm(k.mT, back, out=gradient1)
            torch.bmm(e.mT, u, out=gradient2)

            new_w, new_z = state[t if keep else t % 2]
            if z is None:
                torch.mul(gradient, rate, out=new_z).mul_(2.0 / n_k)
            else:
                torch.mul(z, eta, out=new_z).addcmul_(gradient, rate, value=2.0 / n_k)
            torch.addcmul(new_z, w, retention, out=new_w)
            w, z = new_w, new_z

    return y.to(qkv.dtype), states, surprises, factors, errors, scales


def backward(
    dy: Tensor,
    qkv: Tensor,
    scales: Tensor,
    start: Tensor,
    generator_weight: Tensor,
    states: Tensor,
    factors: Tensor,
    errors: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, of M_0 as (2, d, h) and of the update generator's logits, (U, B, 3d).

    The gradient of theta is read off the states: what it scales is Z_t - eta Z_{t-1}.
    """
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    n_keys, n_queries = zip(*(step.sizes for step in steps(read, tokens, chunk_length)), strict=True)
    lengths = {*n_keys, *n_queries} - {0}
    count = len(states)
    parts = qkv.unflatten(-1, (3, d))
    decode = _Factors(scales, d, inner_lr)

    d_qkv = torch.empty_like(qkv)
    d_parts = d_qkv.unflatten(-1, (3, d))
    nothing = scales.new_zeros(())
    d_parts[:, errors.shape[1] :, 1:].copy_(nothing)  # keys and values that are never written
    d_starts = scales.new_empty(2, images, d, h)
    d_logits = torch.empty_like(factors)

    for group in _groups(scales, h, max(lengths)):
        b = group.stop - group.start
        scratch = _Scratch(scales, b, lengths, [d] * 4 + [h] * 7)
        (queries, keys, _), (of_queries, of_keys) = parts[group].unbind(2), scales[group].unbind(2)
        d_queries, d_keys, d_values = d_parts[group].unbind(2)
        raw_q, scale_q, d_raw_q, d_context = _by_step(n_queries, queries, of_queries, d_queries, dy[group])
        raw_k, scale_k, d_raw_k, dv, error = _by_step(n_keys, keys, of_keys, d_keys, d_values, errors[group])
        first = start.unsqueeze(1).expand(2, b, d, h)
        state, sigmoids = states[:, :, :, group].unbind(), factors[:, group]
        rates, etas, retentions = (x.unbind() for x in decode.values(sigmoids))
        slopes, alphas = decode.slopes(sigmoids).unbind(), sigmoids[..., 2 * d :].unbind()
        ones = scales.new_ones(b, max(lengths), h)
        # Adjoint of the weights that a step leaves, and of its velocities by way of them and of the next.
        adjoint = scales.new_zeros(2, 2, b, d, h)
        dw, dz = adjoint
        dw1, dw2 = dw
        product, dz_step = torch.empty_like(adjoint), torch.empty_like(dz)

        for t in reversed(range(len(n_keys))):
            n_k, n_q = n_keys[t], n_queries[t]
            w1, w2 = state[min(t, count) - 1][0] if min(t, count) else first

            if n_k:
                eta = etas[t]
                if t:
                    torch.mul(adjoint, state[t - 1], out=product)
                else:
                    torch.mul(dw, first, out=product[0])
                    product[1].zero_()
                along_w, along_old = product.sum((1, 4))
                d_logit = d_logits[t, group]
                d_theta, d_eta, d_alpha = d_logit.view(b, 3, d).unbind(1)
                torch.mul(eta.squeeze(-1), along_old, out=d_eta)
                torch.sum(torch.mul(dz, state[t][1], out=product[1]), (0, 3), out=d_theta).sub_(d_eta)
                torch.mul(alphas[t], along_w, out=d_alpha)
                d_logit.mul_(slopes[t])
                d_surprise = (d_logit @ generator_weight).mul_(2.0 / n_k).unsqueeze(1)
                dz1, dz2 = torch.mul(dz, rates[t], out=dz_step)
                dw.mul_(retentions[t])

                k, e, de, dk, a, u, slope, exponent, curvature, back, dback = scratch.views[n_k]
                torch.mul(raw_k[t], scale_k[t], out=k)
                e.copy_(error[t])
                _gelu(torch.bmm(k, w1, out=a), out=u)
                _gelu_backward(ones[:, :n_k], a, grad_input=slope)
                # GELU''(a) is 2 / sqrt(2 pi) times (1 - a^2 / 2) exp(-a^2 / 2); 2^x costs a third of e^x
                torch.addcmul(nothing, a, a, value=-0.5 / math.log(2.0), out=exponent)
                torch.exp2(exponent, out=curvature)
                torch.addcmul(curvature, curvature, exponent, value=math.log(2.0), out=curvature)
                du = _product(e, w2, out=exponent, scale=2.0 / n_k)
                torch.mul(du, slope, out=back)
                torch.bmm(k, dz1, out=dback)
                curvature.mul_(du).mul_(dback)
                dback.mul_(slope)
                torch.mul(e, d_surprise, out=de)
                de.baddbmm_(u, dz2.mT, alpha=2.0 / n_k)
                de.baddbmm_(dback, w2.mT, alpha=2.0 / n_k)
                torch.mul(de, -1.0, out=dv[t])
                da = torch.bmm(de, w2, out=a)
                da.baddbmm_(e, dz2, alpha=2.0 / n_k).mul_(slope)
                da.add_(curvature, alpha=math.sqrt(2.0 / math.pi))
                torch.bmm(da, w1.mT, out=dk).baddbmm_(back, dz1.mT)
                dw1.baddbmm_(k.mT, da)
                dw2.baddbmm_(de.mT, u)
                dw2.baddbmm_(e.mT, dback, alpha=2.0 / n_k)
                _through_norm(k, scale_k[t], dk, d_raw_k[t], de)
            if n_q:
                q, d_out, dq, buffer, a, u, da, *_ = scratch.views[n_q]
                torch.mul(raw_q[t], scale_q[t], out=q)
                d_out.copy_(d_context[t])
                _gelu(torch.bmm(q, w1, out=a), out=u)
                _gelu_backward(torch.bmm(d_out, w2, out=da), a, grad_input=da)
                torch.bmm(da, w1.mT, out=dq)
                dw1.baddbmm_(q.mT, da)
                dw2.baddbmm_(d_out.mT, u)
                _through_norm(q, scale_q[t], dq, d_raw_q[t], buffer)
            if n_k:
                torch.addcmul(dw, dz, eta, out=dz)
            else:
                dz.copy_(dw)
        d_starts[:, group] = dw

    return d_qkv, d_starts.sum(1), d_logits
