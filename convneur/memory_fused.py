"""The neural memory's recurrence with its backward pass written by hand: the fast version for CPUs and any device.

`convneur.memory` has the equations; this is the same function, faster, for four reasons:
- Only the states and the recall errors are kept for the backward pass. It recomputes everything of size (B, L, h),
  which costs 12 of 96 d^2 multiply-accumulates a token and less time than writing and reading it would.
- Images are taken in groups small enough for the cache, and every step works in the same few buffers.
- What can be done for all chunks at once is, and leaves each chunk in one piece.
- Constant factors ride along with matrix products, and GELU's first and second derivatives are evaluated once.

Shape legend: B images, b images of a group, N tokens, M written tokens, U updates, L tokens a chunk, n_k keys and n_q
queries of a step, d memory width, h hidden width. W2 is held transposed, so that a state is one tensor (2, B, d, h) and
the update factors scale the same axis of both weights.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from convneur.memory_steps import ReadOrder, steps, updates

CACHE_BYTES_PER_THREAD = 2**20  # one (b, n, h) buffer gets half, the backward pass works in eight of them
LINE = 16  # numbers in a cache line


def _groups(scales: Tensor, hidden: int, chunk_length: int) -> list[slice]:
    """Images that are processed together: as many as fit the cache on a CPU, all of them elsewhere."""
    images, tokens = scales.shape[:2]
    size = images
    if scales.device.type == "cpu":
        threads = torch.get_num_threads()
        bytes_per_image = 2 * min(chunk_length, tokens) * hidden * scales.itemsize
        size = threads * max(1, CACHE_BYTES_PER_THREAD // bytes_per_image)
    return [slice(start, min(start + size, images)) for start in range(0, images, size)]


class _Chunks:
    """A row for every token of a group, chunk by chunk: `[i][t]`, chunk t of kind i, is in one piece, (b, L, width)."""

    def __init__(self, like: Tensor, kinds: int, images: int, tokens: int, length: int, width: int) -> None:
        self.edge = tokens // length * length  # where the ragged last chunk begins
        self.whole = like.new_empty(kinds, self.edge // length, images, length, width)
        self.ragged = like.new_empty(kinds, int(tokens > self.edge), images, tokens - self.edge, width)

    def __getitem__(self, kind: int) -> list[Tensor]:
        return [*self.whole[kind], *self.ragged[kind]]

    def beside(self, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """First all whole chunks, (kinds, T, b, L, width), then the ragged one, and the same tokens of other tensors.

        The others are (b, N, kinds, any width); what comes are views.
        """
        for mine, tokens in ((self.whole, slice(self.edge)), (self.ragged, slice(self.edge, None))):
            if mine.numel():
                shape = mine.shape[1], mine.shape[3]
                yield mine, *(x[:, tokens].unflatten(1, shape).permute(3, 1, 0, 2, 4) for x in others)


class _Scratch:
    """Buffers for the rows of a chunk, cut once for each number of rows from storage that all of them share."""

    def __init__(self, like: Tensor, images: int, longest: int, widths: Sequence[int]) -> None:
        self.images, self.widths = images, widths
        self.storage = like.new_empty(images * longest * sum(widths) + LINE * len(widths))
        # No functools.cache: it would hold this object, which holds it, until the garbage collector comes by.
        self.views: dict[int, list[Tensor]] = {}

    def cut(self, rows: int) -> list[Tensor]:
        """One (b, rows, width) for every width."""
        if rows not in self.views:
            self.views[rows] = self._cut(rows)
        return self.views[rows]

    def _cut(self, rows: int) -> list[Tensor]:
        views, end = [], 0
        for width in self.widths:
            size = self.images * rows * width
            views.append(self.storage[end : end + size].view(self.images, rows, width))
            end += -(-size // LINE) * LINE
        return views


def _product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _add_outer(total: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """Adds x^T y to a sum of each image, (b, d, h), or of all images, (d, h)."""
    if total.dim() == 3:
        total.baddbmm_(x.mT, y, alpha=scale)
    else:
        total.addmm_(x.flatten(0, 1).T, y.flatten(0, 1), alpha=scale)


class _Factors:
    """What the update generator's sigmoids (b, 3d) stand for, in one operation each."""

    def __init__(self, like: Tensor, d: int, inner_lr: float) -> None:
        self.d = d
        coefficients = like.new_tensor([[-inner_lr, 1.0, -1.0], [0.0, 0.0, 1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
        self.scale, self.shift, self.slope_scale, self.slope_shift = coefficients.repeat_interleave(d, dim=1)

    def values(self, sigmoids: Tensor) -> tuple[Tensor, ...]:
        """-theta, eta and 1 - alpha, each (b, d, 1)."""
        return torch.addcmul(self.shift, sigmoids, self.scale).view(-1, 3, self.d, 1).unbind(1)

    def slopes(self, sigmoids: Tensor) -> Tensor:
        """1 - sigmoid for theta and eta, sigmoid - 1 for alpha, (b, 3d)."""
        return torch.addcmul(self.slope_shift, sigmoids, self.slope_scale)


def _by_step(pieces: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Deals the chunks out to the steps that have any; the others get nothing of the first."""
    remaining = iter(pieces)
    return [next(remaining) if size else pieces[0][:, :0] for size in sizes]


def _in_pieces(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cuts the memory of (b, M, d) into (b, n, d), for every n of sizes that is not 0."""
    b, _, d = x.shape
    sizes = [n for n in sizes if n]
    return [piece.view(b, n, d) for piece, n in zip(x.view(-1).split([b * n * d for n in sizes]), sizes, strict=True)]


def forward(
    qkv: Tensor,
    scales: Tensor,
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
        qkv: queries, keys and values (B, N, 3d).
        scales: reciprocal norms of queries and keys, (B, N, 2, 1).
        start: W1 and W2^T of M_0, (2, d, h).
        generator_weight: of the update generator, (3d, d).
        generator_bias: (3d,).
        chunk_length: L.
        inner_lr: scale of the inner step size.
        read: reading order.
        keep: whether to keep all states; otherwise there is room for two.
    """
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    keys_of_step, queries_of_step = zip(*(step.sizes for step in steps(read, tokens, chunk_length)), strict=True)
    count, length = updates(read, tokens, chunk_length), min(chunk_length, tokens)
    parts = qkv.unflatten(-1, (3, d))
    decode = _Factors(scales, d, inner_lr)

    y = qkv.new_empty(images, tokens, d)
    states = scales.new_empty(count if keep else min(count, 2), 2, 2, images, d, h)
    surprises = scales.new_empty(count, images, d)
    factors = scales.new_empty(count, images, 3 * d)
    errors = scales.new_empty(images, sum(keys_of_step), d)

    for group in _groups(scales, h, length):
        b = group.stop - group.start
        scratch = _Scratch(scales, b, length, [h, h, h, d])
        qk, context = (_Chunks(scales, kinds, b, tokens, length, d) for kinds in (2, 1))
        for mine, raw, scale in qk.beside(parts[group, :, :2], scales[group]):
            torch.mul(raw, scale, out=mine)
        q, out = (_by_step(x[0], queries_of_step) for x in (qk, context))
        v = parts[group, :, 2].to(scales.dtype).split(length, dim=1)
        k, error = qk[1], _in_pieces(errors[group], keys_of_step)
        state, surprise, sigmoids = states[:, :, :, group].unbind(), surprises[:, group].unbind(), factors[:, group]
        gradient = scales.new_empty(2, b, d, h)
        gradient1, gradient2 = gradient
        w, z = start.unsqueeze(1).expand(2, b, d, h), None
        for t, (n_k, n_q) in enumerate(zip(keys_of_step, queries_of_step, strict=True)):
            w1, w2 = w
            w2_transposed = w2.mT
            if n_q:
                a, u, *_ = scratch.cut(n_q)
                torch.ops.aten.gelu.out(torch.bmm(q[t], w1, out=a), out=u)
                torch.bmm(u, w2_transposed, out=out[t])
            if not n_k:
                continue

            a, u, back, squares = scratch.cut(n_k)
            torch.ops.aten.gelu.out(torch.bmm(k[t], w1, out=a), out=u)
            e = torch.baddbmm(v[t], u, w2_transposed, beta=-1.0, out=error[t])
            torch.sum(torch.mul(e, e, out=squares), 1, out=surprise[t]).mul_(1.0 / n_k)
            torch.addmm(generator_bias, surprise[t], generator_weight.T, out=sigmoids[t]).sigmoid_()
            rate, eta, retention = decode.values(sigmoids[t])
            torch.ops.aten.gelu_backward.grad_input(torch.bmm(e, w2, out=back), a, grad_input=back)
            torch.bmm(k[t].mT, back, out=gradient1)
            torch.bmm(e.mT, u, out=gradient2)

            new_w, new_z = state[t if keep else t % 2]
            if z is None:
                torch.mul(gradient, rate, out=new_z).mul_(2.0 / n_k)
            else:
                torch.mul(z, eta, out=new_z).addcmul_(gradient, rate, value=2.0 / n_k)
            torch.addcmul(new_z, w, retention, out=new_w)
            w, z = new_w, new_z
        for mine, theirs in context.beside(y[group].unsqueeze(2)):
            theirs.copy_(mine)
    return y, states, surprises, factors, errors


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
    (_, tokens, _), (_, d, h) = qkv.shape, start.shape
    keys_of_step, queries_of_step = zip(*(step.sizes for step in steps(read, tokens, chunk_length)), strict=True)
    count, length = len(states), min(chunk_length, tokens)
    parts = qkv.unflatten(-1, (3, d))
    decode = _Factors(scales, d, inner_lr)

    d_qkv = torch.empty_like(qkv)
    d_parts = d_qkv.unflatten(-1, (3, d))
    d_start = scales.new_zeros(2, d, h)
    d_logits = torch.empty_like(factors)

    for group in _groups(scales, h, length):
        b = group.stop - group.start
        scratch = _Scratch(scales, b, length, [h] * 7)
        qk, d_qk, d_value, d_context = (_Chunks(scales, kinds, b, tokens, length, d) for kinds in (2, 2, 1, 1))
        for mine, raw, scale in qk.beside(parts[group, :, :2], scales[group]):
            torch.mul(raw, scale, out=mine)
        for mine, theirs in d_context.beside(dy[group].unsqueeze(2)):
            mine.copy_(theirs)
        q, dq, d_out = (_by_step(x[0], queries_of_step) for x in (qk, d_qk, d_context))
        k, dk, d_recalled, error = qk[1], d_qk[1], d_value[0], _in_pieces(errors[group], keys_of_step)
        for unread in (*dk[count:], *d_recalled[count:]):
            unread.zero_()
        first = start.unsqueeze(1).expand(2, b, d, h)
        state = states[:, :, :, group].unbind()
        nothing, ones = scales.new_zeros(()), _Scratch(scales, b, length, [h])
        ones.storage.fill_(1.0)
        # Adjoint of the weights that a step leaves, and of its velocities by way of them and of the next; a single step
        # leaves neither.
        adjoint = scales.new_zeros(2, 2, b if count else 0, d, h)
        dw, dz = adjoint
        product, dz_step = torch.empty_like(adjoint), torch.empty_like(dz)
        for t in reversed(range(len(keys_of_step))):
            n_k, n_q = keys_of_step[t], queries_of_step[t]
            w1, w2 = state[min(t, count) - 1][0] if min(t, count) else first

            if n_k:
                e, de, sigmoids = error[t], d_recalled[t], factors[t, group]
                rate, eta, retention = decode.values(sigmoids)
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
                torch.mul(sigmoids[:, 2 * d :], along_w, out=d_alpha)
                d_logit.mul_(decode.slopes(sigmoids))
                d_surprise = (d_logit @ generator_weight).mul_(2.0 / n_k).unsqueeze(1)
                dz1, dz2 = torch.mul(dz, rate, out=dz_step)
                dw.mul_(retention)
            if t == 0:
                d_start += dw.sum(1)
            dw1, dw2 = dw if t else d_start  # all images share M_0

            if n_k:
                a, u, slope, exponent, curvature, back, dback = scratch.cut(n_k)
                torch.ops.aten.gelu.out(torch.bmm(k[t], w1, out=a), out=u)
                torch.ops.aten.gelu_backward.grad_input(*ones.cut(n_k), a, grad_input=slope)
                # GELU''(a) is 2 / sqrt(2 pi) times (1 - a^2 / 2) exp(-a^2 / 2); 2^x costs a third of e^x
                torch.addcmul(nothing, a, a, value=-0.5 / math.log(2.0), out=exponent)
                torch.exp2(exponent, out=curvature)
                torch.addcmul(curvature, curvature, exponent, value=math.log(2.0), out=curvature)
                du = _product(e, w2, out=exponent, scale=2.0 / n_k)
                torch.mul(du, slope, out=back)
                torch.bmm(k[t], dz1, out=dback)
                curvature.mul_(du).mul_(dback)
                dback.mul_(slope)
                torch.mul(e, d_surprise, out=de)
                de.baddbmm_(u, dz2.mT, alpha=2.0 / n_k)
                de.baddbmm_(dback, w2.mT, alpha=2.0 / n_k)
                da = torch.bmm(de, w2, out=a)
                da.baddbmm_(e, dz2, alpha=2.0 / n_k).mul_(slope)
                da.add_(curvature, alpha=math.sqrt(2.0 / math.pi))
                torch.bmm(da, w1.mT, out=dk[t]).baddbmm_(back, dz1.mT)
                _add_outer(dw1, k[t], da)
                _add_outer(dw2, de, u)
                _add_outer(dw2, e, dback, scale=2.0 / n_k)
            if n_q:
                a, u, da, *_ = scratch.cut(n_q)
                torch.ops.aten.gelu.out(torch.bmm(q[t], w1, out=a), out=u)
                torch.ops.aten.gelu_backward.grad_input(torch.bmm(d_out[t], w2, out=da), a, grad_input=da)
                torch.bmm(da, w1.mT, out=dq[t])
                _add_outer(dw1, q[t], da)
                _add_outer(dw2, d_out[t], u)
            if n_k:
                torch.addcmul(dw, dz, eta, out=dz)
            else:
                dz.copy_(dw)

        of_inputs = qk.beside(scales[group], d_parts[group, :, :2])
        for (x, scale, theirs), (dx,) in zip(of_inputs, d_qk.beside(), strict=True):
            dx.addcmul_(x, torch.linalg.vecdot(x, dx).unsqueeze(-1), value=-1.0)
            torch.mul(dx, scale, out=theirs)
        for mine, theirs in d_value.beside(d_parts[group, :, 2:]):
            torch.mul(mine, -1.0, out=theirs)
    return d_qkv, d_start, d_logits
