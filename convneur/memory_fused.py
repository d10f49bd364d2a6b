"""The neural memory's recurrence with its backward pass written by hand: the fast version for CPUs and any device.

`convneur.memory` has the equations; this is the same function, faster, for four reasons:
- Keys and queries that meet the same state go through the memory MLP as one matrix.
- Only the states and the recall errors are kept for the backward pass. It recomputes everything of size (B, L, h),
  which costs 12 of 96 d^2 multiply-accumulates a token and less time than writing and reading it would.
- Images are taken in groups small enough for the cache, and every step works in the same few buffers.
- Constant factors ride along with matrix products, and GELU's derivatives share one erf and one exponential.

Shape legend: B images, b images of a group, N tokens, U updates, n_k keys and n_q queries of a step (n together, keys
first), d memory width, h hidden width. W2 is held transposed, so that a state is one tensor (2, B, d, h) and the
update factors scale the same axis of both weights.
"""

import math
from functools import cache

import torch
from torch import Tensor

from convneur.memory_steps import ReadOrder, steps, updates, written_tokens

CACHE_BYTES_PER_THREAD = 2**19  # one (b, n, h) buffer; the backward pass works in five of them and three halves
LINE = 16  # numbers in a cache line


def _groups(norms: Tensor, hidden: int, chunk_length: int) -> list[slice]:
    """Images that are processed together: as many as fit the cache on a CPU, all of them elsewhere."""
    images, tokens = norms.shape[:2]
    size = images
    if norms.device.type == "cpu":
        threads = torch.get_num_threads()
        bytes_per_image = 2 * min(chunk_length, tokens) * hidden * norms.itemsize
        size = threads * max(1, CACHE_BYTES_PER_THREAD // bytes_per_image)
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


class _Scratch:
    """Buffers of a step, cut once for each shape of step from storage that all of them share."""

    def __init__(self, like: Tensor, images: int, longest: int, per_key: list[int], per_row: list[int]) -> None:
        self.images, self.per_key, self.per_row = images, per_key, per_row
        numbers = images * longest * (sum(per_key) + 2 * sum(per_row)) + LINE * (len(per_key) + len(per_row))
        self.storage = like.new_empty(numbers)
        self.cut = cache(self._cut)

    def _cut(self, n_k: int, n_q: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Buffers with a row for every key; for every key and query; and of the latter the keys' and queries' rows."""
        views, offset = [], 0
        for rows, width in [(n_k, w) for w in self.per_key] + [(n_k + n_q, w) for w in self.per_row]:
            size = self.images * rows * width
            views.append(self.storage[offset : offset + size].view(self.images, rows, width))
            offset += -(-size // LINE) * LINE
        per_key, per_row = views[: len(self.per_key)], views[len(self.per_key) :]
        return per_key, per_row, [x[:, :n_k] for x in per_row], [x[:, n_k:] for x in per_row]


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def forward(
    qkv: Tensor,
    norms: Tensor,
    start: Tensor,
    generator_weight: Tensor,
    generator_bias: Tensor,
    chunk_length: int,
    inner_lr: float,
    read: ReadOrder,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Context, states, surprises, factors and errors, as `convneur.memory_operator.neural_memory` returns them.

    Args:
        qkv: queries, keys and values (B, N, 3d); where there is no update, queries alone will do, (B, N, d).
        norms: of queries and keys, (B, N, 2, 1).
        start: W1 and W2^T of M_0, (2, d, h).
        generator_weight: of the update generator, (3d, d).
        generator_bias: (3d,).
        chunk_length: L.
        inner_lr: scale of the inner step size.
        read: reading order.
        keep: whether to keep all states; otherwise there is room for two.
    """
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    plan, count = steps(read, tokens, chunk_length), updates(read, tokens, chunk_length)
    parts = qkv.unflatten(-1, (-1, d))
    y = qkv.new_empty(images, tokens, d)
    states = norms.new_empty(count if keep else min(count, 2), 2, 2, images, d, h)
    factors = norms.new_empty(count, images, 3 * d)
    surprises = norms.new_empty(count, images, d)
    errors = norms.new_empty(images, written_tokens(read, tokens, chunk_length), d)

    for group in _groups(norms, h, chunk_length):
        b = group.stop - group.start
        scratch = _Scratch(norms, b, min(chunk_length, tokens), per_key=[d, d, h], per_row=[d, d, h, h])
        w, z = start.unsqueeze(1).expand(2, b, d, h), None
        for t, step in enumerate(plan):
            n_k, n_q = step.sizes
            (k_step, g_step, back), (x, out, a, u), (x_k, out_k, a_k, u_k), (x_q, out_q, *_) = scratch.cut(n_k, n_q)
            if n_k:
                torch.div(parts[group, step.keys, 1], norms[group, step.keys, 1], out=x_k)
            if n_q:
                torch.div(parts[group, step.queries, 0], norms[group, step.queries, 0], out=x_q)
            torch.bmm(x, w[0], out=a)
            torch.ops.aten.gelu.out(a, out=u)
            torch.bmm(u, w[1].mT, out=out)
            if n_q:
                y[group, step.queries] = out_q
            if not n_k:
                continue

            e = torch.sub(out_k, parts[group, step.keys, 2], out=errors[group, step.keys])
            surprise = torch.mean(torch.mul(e, e, out=g_step), 1, out=surprises[t, group])
            factor = torch.addmm(generator_bias, surprise, generator_weight.T, out=factors[t, group]).sigmoid_()
            theta, eta, alpha = factor.unsqueeze(-1).split(d, dim=1)
            rate = theta.mT * -inner_lr
            _product(e, w[1], out=back, scale=2.0 / n_k)
            torch.ops.aten.gelu_backward.grad_input(back, a_k, grad_input=back)
            torch.mul(x_k, rate, out=k_step)
            torch.mul(e, rate.mul_(2.0 / n_k), out=g_step)

            new_w, new_z = states[t if keep else t % 2, :, :, group]
            if z is None:
                torch.bmm(k_step.mT, back, out=new_z[0])
                torch.bmm(g_step.mT, u_k, out=new_z[1])
            else:
                torch.mul(z, eta, out=new_z)
                new_z[0].baddbmm_(k_step.mT, back)
                new_z[1].baddbmm_(g_step.mT, u_k)
            torch.addcmul(new_z, w, 1.0 - alpha, out=new_w)
            w, z = new_w, new_z
    return y, states, surprises, factors, errors


def backward(
    dy: Tensor,
    qkv: Tensor,
    norms: Tensor,
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

    With a = x W1 for keys and queries alike, it computes t = -a / sqrt(2), E = erfc(t) = 2 Phi(a) and p = exp(-t^2), so
        GELU(a)   = -sqrt(1/2) (t E),
        GELU'(a)  = 1/2 (E - 2/sqrt(pi) t p),
        GELU''(a) = sqrt(2/pi) (p - t^2 p),
    and leaves the constants to the matrix products before or after.
    """
    (_, tokens, _), (_, d, h) = qkv.shape, start.shape
    plan, count = steps(read, tokens, chunk_length), updates(read, tokens, chunk_length)
    zero = norms.new_zeros(())

    parts = qkv.unflatten(-1, (-1, d))
    d_qkv = torch.empty_like(qkv)
    d_parts = d_qkv.unflatten(-1, (-1, d))
    d_start = norms.new_zeros(2, d, h)
    d_logits = torch.empty_like(factors)
    d_parts[:, plan[count - 1].keys.stop if count else 0 :, 1:] = 0.0  # keys and values that nothing read

    for group in _groups(norms, h, chunk_length):
        b = group.stop - group.start
        scratch = _Scratch(norms, b, min(chunk_length, tokens), per_key=[d] * 5 + [h] * 3, per_row=[d] * 3 + [h] * 5)
        # Adjoints of the weights and velocities that a step leaves; without updates there is but one step.
        dw, dz = (norms.new_zeros(2, b if count else 0, d, h) for _ in range(2))
        product = torch.empty_like(dw)
        for t in reversed(range(len(plan))):
            keys, queries = plan[t]
            n_k, n_q = plan[t].sizes
            per_key, per_row, of_keys, of_queries = scratch.cut(n_k, n_q)
            k_step, g_step, dk_step, dg_step, tmp, half, dback, back = per_key
            x, r, dx, arg, u, slope, exponent, density = per_row
            x_k, r_k, dx_k, _, u_k, slope_k, exponent_k, density_k = of_keys
            x_q, r_q, dx_q, *_ = of_queries
            w, z = (
                states[min(t, count) - 1, :, :, group]
                if min(t, count)
                else (start.unsqueeze(1).expand(2, b, d, h), None)
            )

            if n_k:
                torch.div(parts[group, keys, 1], norms[group, keys, 1], out=x_k)
            if n_q:
                torch.div(parts[group, queries, 0], norms[group, queries, 0], out=x_q)
                r_q.copy_(dy[group, queries])
            _product(x, w[0], out=arg, scale=-math.sqrt(0.5))
            torch.erfc(arg, out=slope)
            torch.mul(arg, slope, out=u)
            torch.addcmul(zero, arg, arg, value=-1.0, out=exponent)
            torch.exp(exponent, out=density)
            slope.addcmul_(arg, density, value=-2.0 / math.sqrt(math.pi))
            if n_k:
                e = errors[group, keys]
                factor = factors[t, group]
                theta, eta, alpha = factor.unsqueeze(-1).split(d, dim=1)
                rate = theta.mT * -inner_lr
                rate_g = rate * (2.0 / n_k)
                curvature = torch.addcmul(density_k, density_k, exponent_k, out=exponent_k)
                _product(e, w[1], out=half, scale=1.0 / n_k)
                torch.mul(half, slope_k, out=back)

                dz.add_(dw)
                d_logit = d_logits[t, group]
                d_theta, d_eta, d_alpha = d_logit.split(d, dim=1)
                torch.sum(torch.mul(dw, w, out=product), (0, 3), out=d_alpha).neg_()
                if z is None:
                    d_eta.zero_()
                else:
                    torch.sum(torch.mul(dz, z, out=product), (0, 3), out=d_eta)
                torch.bmm(back, dz[0].mT, out=dk_step)
                _product(u_k, dz[1].mT, out=dg_step, scale=-math.sqrt(0.5))
                torch.mul(x_k, dk_step, out=tmp)
                torch.sum(tmp.addcmul_(e, dg_step, value=2.0 / n_k), 1, out=d_theta).mul_(-inner_lr)
                d_logit.mul_(factor).addcmul_(d_logit, factor, value=-1.0)
                d_surprise = (d_logit @ generator_weight).mul_(2.0 / n_k).unsqueeze(1)

                torch.mul(x_k, rate, out=k_step)
                torch.mul(e, rate_g, out=g_step)
                _product(k_step, dz[0], out=dback, scale=0.5)
                torch.mul(dback, slope_k, out=back)
                dback.mul_(half)
                torch.mul(e, d_surprise, out=r_k)
                r_k.addcmul_(dg_step, rate_g)
                r_k.baddbmm_(back, w[1].mT, alpha=2.0 / n_k)
                torch.mul(r_k, -1.0, out=d_parts[group, keys, 2])

            da, da_k = density, density_k
            _product(r, w[1], out=da, scale=0.5)
            if n_k:
                da_k.baddbmm_(g_step, dz[1], alpha=0.5)
            da.mul_(slope)
            if n_k:
                da_k.addcmul_(dback, curvature, value=4.0 * math.sqrt(2.0 / math.pi))
            torch.bmm(da, w[0].mT, out=dx)
            if n_k:
                dx_k.addcmul_(dk_step, rate)

            if n_k:
                dw.mul_(1.0 - alpha)
                dz.mul_(eta)
            if t:
                dw[0].baddbmm_(x.mT, da)
                dw[1].baddbmm_(r.mT, u, alpha=-math.sqrt(0.5))
                if n_k:
                    dw[1].baddbmm_(e.mT, back, alpha=2.0 / n_k)
            else:  # all images share M_0
                d_start += dw.sum(1)
                d_start[0].addmm_(x.flatten(0, 1).T, da.flatten(0, 1))
                d_start[1].addmm_(r.flatten(0, 1).T, u.flatten(0, 1), alpha=-math.sqrt(0.5))
                if n_k:
                    d_start[1].addmm_(e.flatten(0, 1).T, back.flatten(0, 1), alpha=2.0 / n_k)

            dx.addcmul_(x, torch.linalg.vecdot(x, dx).unsqueeze(-1), value=-1.0)
            if n_k:
                torch.div(dx_k, norms[group, keys, 1], out=d_parts[group, keys, 1])
            if n_q:
                torch.div(dx_q, norms[group, queries, 0], out=d_parts[group, queries, 0])

    return d_qkv, d_start, d_logits
