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

from convneur.ops.memory.passes import Given, Gradients, Kept, Settings, kept_shapes
from convneur.ops.memory.reading import steps

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


class _Plan:
    """What all groups of images share: the sizes of the steps, and what the update factors stand for."""

    def __init__(self, given: Given, settings: Settings) -> None:
        tokens, d = given.qkv.shape[1], given.start.shape[1]
        sizes = (step.sizes for step in steps(settings.read, tokens, settings.chunk_length))
        self.keys, self.queries = zip(*sizes, strict=True)  # numbers of them in each step
        self.lengths = {*self.keys, *self.queries} - {0}
        self.decode = _Factors(given.start, d, settings.inner_lr)


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


def forward(given: Given, settings: Settings, keep: bool) -> tuple[Tensor, Kept]:
    """The context, and what is kept; without `keep` there is room for two states, and all of it is scratch."""
    qkv, start = given.qkv, given.start
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    of_states, *others, _ = kept_shapes(images, tokens, d, h, settings)
    room = of_states if keep else (min(of_states[0], 2), *of_states[1:])
    scales = reciprocal_norms(qkv, d, start.dtype)
    kept = Kept(*[*(start.new_empty(shape) for shape in (room, *others)), scales])
    y = start.new_empty(images, tokens, d)
    plan = _Plan(given, settings)
    for group in _groups(scales, h, max(plan.lengths)):
        _ForwardPass(_given_of(given, group), plan, _kept_of(kept, group), keep, y[group]).run()
    return y.to(qkv.dtype), kept


def backward(dy: Tensor, given: Given, kept: Kept, settings: Settings) -> Gradients:
    """Gradients of what was given."""
    (images, _, _), (_, d, h) = given.qkv.shape, given.start.shape
    d_qkv = torch.empty_like(given.qkv)
    written = kept.errors.shape[1]
    d_qkv[:, written:, d:].copy_(given.start.new_zeros(()))  # keys and values that are never written
    d_starts = given.start.new_empty(2, images, d, h)
    d_logits = torch.empty_like(kept.factors)
    plan = _Plan(given, settings)
    for group in _groups(kept.scales, h, max(plan.lengths)):
        of_group = _given_of(given, group), plan, _kept_of(kept, group)
        backward_pass = _BackwardPass(dy[group], *of_group, d_qkv[group], d_logits[:, group])
        d_starts[:, group] = backward_pass.run()
    return Gradients(d_qkv, d_starts.sum(1), d_logits)


def _given_of(given: Given, group: slice) -> Given:
    """The same for a group of the images."""
    return given._replace(qkv=given.qkv[group])


def _kept_of(kept: Kept, group: slice) -> Kept:
    """The same for a group of the images."""
    of_updates = kept.states[:, :, :, group], kept.surprises[:, group], kept.factors[:, group]
    return Kept(*of_updates, kept.errors[group], kept.scales[group])


class _ForwardPass:
    """The loop over the chunks of a group of images, which fills in what is kept, and the context y (b, N, d)."""

    def __init__(self, given: Given, plan: _Plan, kept: Kept, keep: bool, y: Tensor) -> None:
        (b, _, _), (_, d, h) = given.qkv.shape, given.start.shape
        self.given, self.plan, self.keep, self.d = given, plan, keep, d
        self.states, self.surprises, self.sigmoids = kept.states.unbind(), kept.surprises.unbind(), kept.factors
        self.scratch = _Scratch(given.start, b, plan.lengths, [d, d, h, h, h])
        queries, keys, values = given.qkv.unflatten(-1, (3, d)).unbind(2)
        of_queries, of_keys = kept.scales.unbind(2)
        self.raw_q, self.scale_q, self.context = _by_step(plan.queries, queries, of_queries, y)
        self.raw_k, self.scale_k, self.v, self.errors = _by_step(plan.keys, keys, of_keys, values, kept.errors)
        self.gradient = given.start.new_empty(2, b, d, h)
        self.w: Tensor = given.start.unsqueeze(1).expand(2, b, d, h)
        self.z: Tensor | None = None

    def run(self) -> None:
        for t, (keys, queries) in enumerate(zip(self.plan.keys, self.plan.queries, strict=True)):
            if queries:
                self._retrieve(t)
            if keys:
                self._update(t)

    def _retrieve(self, t: int) -> None:
        q, out, a, u, _ = self.scratch.views[self.plan.queries[t]]
        w1, w2 = self.w
        torch.mul(self.raw_q[t], self.scale_q[t], out=q)
        _gelu(torch.bmm(q, w1, out=a), out=u)
        self.context[t].copy_(torch.bmm(u, w2.mT, out=out))

    def _update(self, t: int) -> None:
        n = self.plan.keys[t]
        k, e, a, u, back = self.scratch.views[n]
        w1, w2 = self.w
        torch.mul(self.raw_k[t], self.scale_k[t], out=k)
        _gelu(torch.bmm(k, w1, out=a), out=u)
        torch.bmm(u, w2.mT, out=e).sub_(self.v[t])
        if self.keep:
            self.errors[t].copy_(e)
        surprise, sigmoids = self.surprises[t], self.sigmoids[t]
        torch.sum(torch.mul(e, e, out=back[..., : self.d]), 1, out=surprise).mul_(1.0 / n)
        torch.addmm(self.given.generator_bias, surprise, self.given.generator_weight.T, out=sigmoids).sigmoid_()
        gradient1, gradient2 = self.gradient
        _gelu_backward(torch.bmm(e, w2, out=back), a, grad_input=back)
        torch.bmm(k.mT, back, out=gradient1)
        torch.bmm(e.mT, u, out=gradient2)
        self._step(t, sigmoids, 2.0 / n)

    def _step(self, t: int, sigmoids: Tensor, scale: float) -> None:
        """Z_t and M_t, of a gradient that lacks a scale."""
        rate, eta, retention = self.plan.decode.values(sigmoids)
        w, z = self.states[t if self.keep else t % 2]
        if self.z is None:
            torch.mul(self.gradient, rate, out=z).mul_(scale)
        else:
            torch.mul(self.z, eta, out=z).addcmul_(self.gradient, rate, value=scale)
        torch.addcmul(z, self.w, retention, out=w)
        self.w, self.z = w, z


class _BackwardPass:
    """The loop over the chunks of a group of images, last to first, which fills in d_qkv and d_logits (U, b, 3d).

    Attributes:
        dw: adjoint of the weights that a step leaves, (2, b, d, h).
        dz: adjoint of its velocities, by way of the weights and of the next velocities, (2, b, d, h).
    """

    def __init__(self, dy: Tensor, given: Given, plan: _Plan, kept: Kept, d_qkv: Tensor, d_logits: Tensor) -> None:
        (b, _, _), (_, d, h) = given.qkv.shape, given.start.shape
        self.given, self.plan, self.d_logits = given, plan, d_logits
        self.states, sigmoids = kept.states.unbind(), kept.factors
        self.first = given.start.unsqueeze(1).expand(2, b, d, h)
        queries, keys, _ = given.qkv.unflatten(-1, (3, d)).unbind(2)
        d_queries, d_keys, d_values = d_qkv.unflatten(-1, (3, d)).unbind(2)
        of_queries, of_keys = kept.scales.unbind(2)
        self.raw_q, self.scale_q, self.d_raw_q, self.d_context = _by_step(
            plan.queries, queries, of_queries, d_queries, dy
        )
        self.raw_k, self.scale_k, self.d_raw_k, self.dv, self.errors = _by_step(
            plan.keys, keys, of_keys, d_keys, d_values, kept.errors
        )
        self.rates, self.etas, self.retentions = (x.unbind() for x in plan.decode.values(sigmoids))
        self.slopes, self.alphas = plan.decode.slopes(sigmoids).unbind(), sigmoids[..., 2 * d :].unbind()
        self.scratch = _Scratch(given.start, b, plan.lengths, [d] * 4 + [h] * 7)
        self.ones, self.nothing = given.start.new_ones(b, max(plan.lengths), h), given.start.new_zeros(())
        self.adjoint = given.start.new_zeros(2, 2, b, d, h)
        self.dw, self.dz = self.adjoint
        self.product, self.dz_step = torch.empty_like(self.adjoint), torch.empty_like(self.dz)

    def run(self) -> Tensor:
        """Gradient of M_0 by way of each image, (2, b, d, h)."""
        for t in reversed(range(len(self.plan.keys))):
            n_k, n_q = self.plan.keys[t], self.plan.queries[t]
            newest = min(t, len(self.states))
            w1, w2 = self.states[newest - 1][0] if newest else self.first
            if n_k:
                self._through_keys(t, w1, w2, self._through_factors(t))
            if n_q:
                self._through_queries(t, w1, w2)
            if n_k:
                torch.addcmul(self.dw, self.dz, self.etas[t], out=self.dz)
            else:
                self.dz.copy_(self.dw)
        return self.dw

    def _through_factors(self, t: int) -> Tensor:
        """Writes the logits' gradient, and lets dw pass the decay and dz, as dz_step, the step size.

        That of theta is read off the states: what it scales is Z_t - eta Z_{t-1}. Returns what the errors' adjoint gets
        by way of the surprise, over the errors, (b, 1, d).
        """
        dz, product, eta = self.dz, self.product, self.etas[t]
        if t:
            torch.mul(self.adjoint, self.states[t - 1], out=product)
        else:
            torch.mul(self.dw, self.first, out=product[0])
            product[1].zero_()
        along_w, along_old = product.sum((1, 4))
        d_logit = self.d_logits[t]
        d_theta, d_eta, d_alpha = d_logit.unflatten(1, (3, -1)).unbind(1)
        torch.mul(eta.squeeze(-1), along_old, out=d_eta)
        torch.sum(torch.mul(dz, self.states[t][1], out=product[1]), (0, 3), out=d_theta).sub_(d_eta)
        torch.mul(self.alphas[t], along_w, out=d_alpha)
        d_logit.mul_(self.slopes[t])
        torch.mul(dz, self.rates[t], out=self.dz_step)
        self.dw.mul_(self.retentions[t])
        return (d_logit @ self.given.generator_weight).mul_(2.0 / self.plan.keys[t]).unsqueeze(1)

    def _through_keys(self, t: int, w1: Tensor, w2: Tensor, d_surprise: Tensor) -> None:
        n = self.plan.keys[t]
        (dw1, dw2), (dz1, dz2) = self.dw, self.dz_step
        k, e, de, dk, a, u, slope, exponent, curvature, back, dback = self.scratch.views[n]
        torch.mul(self.raw_k[t], self.scale_k[t], out=k)
        e.copy_(self.errors[t])
        _gelu(torch.bmm(k, w1, out=a), out=u)
        _gelu_backward(self.ones[:, :n], a, grad_input=slope)
        # GELU''(a) is 2 / sqrt(2 pi) times (1 - a^2 / 2) exp(-a^2 / 2); 2^x costs a third of e^x
        torch.addcmul(self.nothing, a, a, value=-0.5 / math.log(2.0), out=exponent)
        torch.exp2(exponent, out=curvature)
        torch.addcmul(curvature, curvature, exponent, value=math.log(2.0), out=curvature)
        du = _product(e, w2, out=exponent, scale=2.0 / n)
        torch.mul(du, slope, out=back)
        torch.bmm(k, dz1, out=dback)
        curvature.mul_(du).mul_(dback)
        dback.mul_(slope)
        torch.mul(e, d_surprise, out=de)
        de.baddbmm_(u, dz2.mT, alpha=2.0 / n)
        de.baddbmm_(dback, w2.mT, alpha=2.0 / n)
        torch.mul(de, -1.0, out=self.dv[t])
        da = torch.bmm(de, w2, out=a)
        da.baddbmm_(e, dz2, alpha=2.0 / n).mul_(slope)
        da.add_(curvature, alpha=math.sqrt(2.0 / math.pi))
        torch.bmm(da, w1.mT, out=dk).baddbmm_(back, dz1.mT)
        dw1.baddbmm_(k.mT, da)
        dw2.baddbmm_(de.mT, u)
        dw2.baddbmm_(e.mT, dback, alpha=2.0 / n)
        _through_norm(k, self.scale_k[t], dk, self.d_raw_k[t], de)

    def _through_queries(self, t: int, w1: Tensor, w2: Tensor) -> None:
        q, d_out, dq, buffer, a, u, da, *_ = self.scratch.views[self.plan.queries[t]]
        dw1, dw2 = self.dw
        torch.mul(self.raw_q[t], self.scale_q[t], out=q)
        d_out.copy_(self.d_context[t])
        _gelu(torch.bmm(q, w1, out=a), out=u)
        _gelu_backward(torch.bmm(d_out, w2, out=da), a, grad_input=da)
        torch.bmm(da, w1.mT, out=dq)
        dw1.baddbmm_(q.mT, da)
        dw2.baddbmm_(d_out.mT, u)
        _through_norm(q, self.scale_q[t], dq, self.d_raw_q[t], buffer)
