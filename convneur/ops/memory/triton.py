"""The neural memory's recurrence as one CUDA kernel in each direction, written in Triton. Never timed: see below.

equations.py has the equations and operator.py the operator that calls this file. One program takes
one image through all its chunks. Tiles of (rows, hidden units) exist in registers only; the state, at most a few
hundred kilobytes an image, goes from chunk to chunk through the L2 cache, where the backward pass wants it anyway.
Every pass over a chunk is one of two loops:
- rows outside, hidden units inside, for what is a sum over hidden units: recalled values and their errors;
- hidden units outside, rows inside, for what is a sum over rows: gradients of the weights, which are then applied.

This project had no GPU at hand. The tests run these kernels in Triton's interpreter against the plain version, outputs
and gradients; that they are fast is a design, not a measurement. `benchmarks/memory.py --device cuda` measures.

Shape legend: B images, N tokens, U updates, d memory width, h hidden width; tiles of bm rows, bh hidden units and bd
channels, the power of two from 16 up that holds d; masks hide the rest.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from convneur.ops.memory.eager import reciprocal_norms
from convneur.ops.memory.passes import Given, Gradients, Kept, Settings, kept_shapes
from convneur.ops.memory.reading import ReadOrder, steps

LARGEST_DIM = 128  # beyond it a tile of the state fills the registers


@triton.jit
def _gelu(a):
    return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))


@triton.jit
def _gelu_and_derivatives(a):
    """GELU, its slope and its curvature."""
    cdf = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * a * a)
    return a * cdf, cdf + a * pdf, pdf * (2.0 - a * a)


@triton.jit
def _load_rows(ptr, stride, start, stop, d: tl.constexpr, bm: tl.constexpr, bd: tl.constexpr):
    """(bm, bd) rows start.. of a matrix (., d), zero beyond `stop` and d."""
    rows, columns = start + tl.arange(0, bm)[:, None], tl.arange(0, bd)[None, :]
    return tl.load(ptr + rows * stride + columns, (rows < stop) & (columns < d), other=0.0).to(tl.float32)


@triton.jit
def _store_rows(ptr, stride, start, stop, x, d: tl.constexpr, bm: tl.constexpr, bd: tl.constexpr):
    rows, columns = start + tl.arange(0, bm)[:, None], tl.arange(0, bd)[None, :]
    tl.store(ptr + rows * stride + columns, x.to(ptr.dtype.element_ty), (rows < stop) & (columns < d))


@triton.jit
def _load_scales(ptr, start, stop, bm: tl.constexpr):
    """(bm, 1) reciprocal norms of the queries or keys start.., one beyond `stop`."""
    rows = start + tl.arange(0, bm)[:, None]
    return tl.load(ptr + 2 * rows, rows < stop, other=1.0)


@triton.jit
def _through_norm(x, scale, dx):
    """Gradient of x, given that of x scale."""
    x *= scale
    return (dx - x * tl.sum(x * dx, 1, keep_dims=True)) * scale


@triton.jit
def _load_columns(ptr, start, d: tl.constexpr, h: tl.constexpr, bd: tl.constexpr, bh: tl.constexpr):
    """(bd, bh) columns start.. of a weight (d, h), zero beyond."""
    rows, columns = tl.arange(0, bd)[:, None], start + tl.arange(0, bh)[None, :]
    return tl.load(ptr + rows * h + columns, (rows < d) & (columns < h), other=0.0)


@triton.jit
def _store_columns(ptr, start, x, d: tl.constexpr, h: tl.constexpr, bd: tl.constexpr, bh: tl.constexpr):
    rows, columns = tl.arange(0, bd)[:, None], start + tl.arange(0, bh)[None, :]
    tl.store(ptr + rows * h + columns, x, (rows < d) & (columns < h))


@triton.jit
def _recall(
    x,
    w1,
    w2,
    d: tl.constexpr,
    h: tl.constexpr,
    bm: tl.constexpr,
    bd: tl.constexpr,
    bh: tl.constexpr,
    prec: tl.constexpr,
):
    """M(x) of rows (bm, bd)."""
    out = tl.zeros((bm, bd), tl.float32)
    for j in range(0, h, bh):
        u = _gelu(tl.dot(x, _load_columns(w1, j, d, h, bd, bh), input_precision=prec))
        out = tl.dot(u, tl.trans(_load_columns(w2, j, d, h, bd, bh)), out, input_precision=prec)
    return out


@triton.jit
def _forward_kernel(
    qkv, scales, start, generator_weight, generator_bias, plan, y, states, surprises, factors, errors,
    images, tokens, written, number_of_steps, inner_lr,
    d: tl.constexpr, h: tl.constexpr, keep_states: tl.constexpr,
    bm: tl.constexpr, bd: tl.constexpr, bh: tl.constexpr, prec: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    layer = images.to(tl.int64) * d * h  # between the weights W1, W2^T and their velocities in `states`
    width = 3 * d
    q = qkv + b * tokens * width
    k, v = q + d, q + 2 * d
    q_scale = scales + b * tokens * 2
    k_scale = q_scale + 1
    channel = tl.arange(0, bd)
    in_d = channel < d
    square = channel[:, None] * d + channel[None, :]
    in_square = in_d[:, None] & in_d[None, :]

    w1, w2 = start, start + d * h
    for t in range(number_of_steps):
        first_key, last_key = tl.load(plan + 4 * t), tl.load(plan + 4 * t + 1)
        first_query, last_query = tl.load(plan + 4 * t + 2), tl.load(plan + 4 * t + 3)
        for row in range(first_query, last_query, bm):
            x = _load_rows(q, width, row, last_query, d, bm, bd) * _load_scales(q_scale, row, last_query, bm)
            out = _recall(x, w1, w2, d, h, bm, bd, bh, prec)
            _store_rows(y + b * tokens * d, d, row, last_query, out, d, bm, bd)

        if last_key > first_key:
            n = (last_key - first_key).to(tl.float32)
            e_of_image = errors + b * written * d
            surprise = tl.zeros((bd,), tl.float32)
            for row in range(first_key, last_key, bm):
                x = _load_rows(k, width, row, last_key, d, bm, bd) * _load_scales(k_scale, row, last_key, bm)
                e = _recall(x, w1, w2, d, h, bm, bd, bh, prec)
                e -= _load_rows(v, width, row, last_key, d, bm, bd)
                e = tl.where(row + tl.arange(0, bm)[:, None] < last_key, e, 0.0)
                _store_rows(e_of_image, d, row, last_key, e, d, bm, bd)
                surprise += tl.sum(e * e, 0)
            surprise /= n
            tl.store(surprises + (t * images + b) * d + channel, surprise, in_d)

            factor = factors + (t * images + b) * 3 * d + channel
            for i in tl.static_range(3):
                weight = tl.load(generator_weight + i * d * d + square, in_square, other=0.0)
                logit = tl.sum(weight * surprise[None, :], 1)
                logit += tl.load(generator_bias + i * d + channel, in_d, other=0.0)
                tl.store(factor + i * d, 1.0 / (1.0 + tl.exp(-logit)), in_d)
            tl.debug_barrier()  # the errors and factors are read by other threads than wrote them
            step = -inner_lr * tl.load(factor, in_d, other=0.0)[:, None]
            eta = tl.load(factor + d, in_d, other=0.0)[:, None]
            alpha = tl.load(factor + 2 * d, in_d, other=0.0)[:, None]

            new = states + ((t if keep_states else t % 2) * 4 * images + b) * d * h
            old = states + ((t - 1 if keep_states else (t + 1) % 2) * 4 * images + b) * d * h
            for j in range(0, h, bh):
                w1_j, w2_j = _load_columns(w1, j, d, h, bd, bh), _load_columns(w2, j, d, h, bd, bh)
                grad1, grad2 = tl.zeros((bd, bh), tl.float32), tl.zeros((bd, bh), tl.float32)
                for row in range(first_key, last_key, bm):
                    x = _load_rows(k, width, row, last_key, d, bm, bd) * _load_scales(k_scale, row, last_key, bm)
                    g = _load_rows(e_of_image, d, row, last_key, d, bm, bd) * (2.0 / n)
                    u, slope, _ = _gelu_and_derivatives(tl.dot(x, w1_j, input_precision=prec))
                    back = tl.dot(g, w2_j, input_precision=prec) * slope
                    grad1 = tl.dot(tl.trans(x), back, grad1, input_precision=prec)
                    grad2 = tl.dot(tl.trans(g), u, grad2, input_precision=prec)
                z1, z2 = step * grad1, step * grad2
                if t > 0:
                    z1 += eta * _load_columns(old + 2 * layer, j, d, h, bd, bh)
                    z2 += eta * _load_columns(old + 3 * layer, j, d, h, bd, bh)
                _store_columns(new, j, (1.0 - alpha) * w1_j + z1, d, h, bd, bh)
                _store_columns(new + layer, j, (1.0 - alpha) * w2_j + z2, d, h, bd, bh)
                _store_columns(new + 2 * layer, j, z1, d, h, bd, bh)
                _store_columns(new + 3 * layer, j, z2, d, h, bd, bh)
            tl.debug_barrier()  # the next step reads the new state
            w1, w2 = new, new + layer


@triton.jit
def _backward_kernel(
    dy, qkv, scales, start, generator_weight, plan, states, factors, errors,
    d_qkv, d_logits, dw, dz, de, dx,
    images, tokens, written, longest, number_of_steps, count, inner_lr,
    d: tl.constexpr, h: tl.constexpr,
    bm: tl.constexpr, bd: tl.constexpr, bh: tl.constexpr, prec: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    layer = images.to(tl.int64) * d * h
    width = 3 * d
    q = qkv + b * tokens * width
    k = q + d
    q_scale = scales + b * tokens * 2
    k_scale = q_scale + 1
    dq = d_qkv + b * tokens * width
    dk, dv = dq + d, dq + 2 * d
    dy += b * tokens * d
    errors += b * written * d
    dw += b * d * h  # adjoint of the weights, and
    dz += b * d * h  # of the velocities; the two layers of both are `layer` apart
    de += b * longest * d
    dx_k = dx + b * 2 * longest * d
    dx_q = dx_k + longest * d
    channel = tl.arange(0, bd)
    in_d = channel < d
    square = channel[:, None] * d + channel[None, :]
    in_square = in_d[:, None] & in_d[None, :]

    for i in range(number_of_steps):
        t = number_of_steps - 1 - i
        first_key, last_key = tl.load(plan + 4 * t), tl.load(plan + 4 * t + 1)
        first_query, last_query = tl.load(plan + 4 * t + 2), tl.load(plan + 4 * t + 3)
        has_keys = last_key > first_key
        n = tl.maximum(last_key - first_key, 1).to(tl.float32)
        old = states + ((tl.minimum(t, count) - 1) * 4 * images + b) * d * h
        new = old + 4 * layer
        w1, w2 = old, old + layer
        if t == 0:
            w1, w2 = start, start + d * h
        factor = factors + (t * images + b) * 3 * d + channel
        step, keep, eta = tl.zeros((bd,), tl.float32), tl.full((bd,), 1.0, tl.float32), tl.full((bd,), 1.0, tl.float32)

        if has_keys:
            # dz becomes the adjoint of Z_{t+1}. What theta scaled is read off the states: Z_{t+1} - eta Z_t.
            theta, eta = tl.load(factor, in_d, other=0.0), tl.load(factor + d, in_d, other=0.0)
            alpha = tl.load(factor + 2 * d, in_d, other=0.0)
            step, keep = -inner_lr * theta, 1.0 - alpha
            along_w, along_old, along_new = (
                tl.zeros((bd,), tl.float32), tl.zeros((bd,), tl.float32), tl.zeros((bd,), tl.float32)
            )  # fmt: skip
            for j in range(0, h, bh):
                for i_layer in tl.static_range(2):
                    dw_j = _load_columns(dw + i_layer * layer, j, d, h, bd, bh)
                    dz_j = dw_j + _load_columns(dz + i_layer * layer, j, d, h, bd, bh)
                    _store_columns(dz + i_layer * layer, j, dz_j, d, h, bd, bh)
                    w_j = _load_columns(w2 if i_layer else w1, j, d, h, bd, bh)
                    along_w += tl.sum(dw_j * w_j, 1)
                    along_new += tl.sum(dz_j * _load_columns(new + (2 + i_layer) * layer, j, d, h, bd, bh), 1)
                    if t > 0:
                        along_old += tl.sum(dz_j * _load_columns(old + (2 + i_layer) * layer, j, d, h, bd, bh), 1)
            d_theta = (1.0 - theta) * (along_new - eta * along_old)
            d_eta = eta * (1.0 - eta) * along_old
            d_alpha = -alpha * (1.0 - alpha) * along_w
            d_logit = d_logits + (t * images + b) * 3 * d + channel
            tl.store(d_logit, d_theta, in_d)
            tl.store(d_logit + d, d_eta, in_d)
            tl.store(d_logit + 2 * d, d_alpha, in_d)
            tl.debug_barrier()
            d_surprise = tl.zeros((bd,), tl.float32)
            for i_factor in tl.static_range(3):
                weight = tl.load(generator_weight + i_factor * d * d + square, in_square, other=0.0)
                column = tl.load(d_logit + i_factor * d, in_d, other=0.0)
                d_surprise += tl.sum(weight * column[:, None], 0)

            # Adjoint of the recalled values of the keys.
            for row in range(first_key, last_key, bm):
                x = _load_rows(k, width, row, last_key, d, bm, bd) * _load_scales(k_scale, row, last_key, bm)
                e = _load_rows(errors, d, row, last_key, d, bm, bd)
                x_step = x * step[None, :]
                along_g = tl.zeros((bm, bd), tl.float32)
                de_row = e * d_surprise[None, :]
                for j in range(0, h, bh):
                    u, slope, _ = _gelu_and_derivatives(
                        tl.dot(x, _load_columns(w1, j, d, h, bd, bh), input_precision=prec)
                    )
                    d_back = tl.dot(x_step, _load_columns(dz, j, d, h, bd, bh), input_precision=prec) * slope
                    dz2 = _load_columns(dz + layer, j, d, h, bd, bh)
                    along_g = tl.dot(u, tl.trans(dz2), along_g, input_precision=prec)
                    w2_j = _load_columns(w2, j, d, h, bd, bh)
                    de_row = tl.dot(d_back, tl.trans(w2_j), de_row, input_precision=prec)
                de_row = (de_row + along_g * step[None, :]) * (2.0 / n)
                _store_rows(de, d, row - first_key, last_key - first_key, de_row, d, bm, bd)
                _store_rows(dv, width, row, last_key, -de_row, d, bm, bd)
            tl.debug_barrier()

        for j in range(0, h, bh):
            w1_j, w2_j = _load_columns(w1, j, d, h, bd, bh), _load_columns(w2, j, d, h, bd, bh)
            dz1, dz2 = _load_columns(dz, j, d, h, bd, bh), _load_columns(dz + layer, j, d, h, bd, bh)
            dw1 = keep[:, None] * _load_columns(dw, j, d, h, bd, bh)
            dw2 = keep[:, None] * _load_columns(dw + layer, j, d, h, bd, bh)
            for row in range(first_key, last_key, bm):
                x = _load_rows(k, width, row, last_key, d, bm, bd) * _load_scales(k_scale, row, last_key, bm)
                g = _load_rows(errors, d, row, last_key, d, bm, bd) * (2.0 / n)
                de_row = _load_rows(de, d, row - first_key, last_key - first_key, d, bm, bd)
                u, slope, curvature = _gelu_and_derivatives(tl.dot(x, w1_j, input_precision=prec))
                back = tl.dot(g, w2_j, input_precision=prec)
                d_back = tl.dot(x * step[None, :], dz1, input_precision=prec)
                da = tl.dot(de_row, w2_j, input_precision=prec)
                da = tl.dot(g * step[None, :], dz2, da, input_precision=prec) * slope + d_back * back * curvature
                dw1 = tl.dot(tl.trans(x), da, dw1, input_precision=prec)
                dw2 = tl.dot(tl.trans(de_row), u, dw2, input_precision=prec)
                dw2 = tl.dot(tl.trans(g), d_back * slope, dw2, input_precision=prec)
                dx_row = tl.dot(back * slope, tl.trans(dz1), input_precision=prec) * step[None, :]
                dx_row = tl.dot(da, tl.trans(w1_j), dx_row, input_precision=prec)
                if j > 0:
                    dx_row += _load_rows(dx_k, d, row - first_key, last_key - first_key, d, bm, bd)
                _store_rows(dx_k, d, row - first_key, last_key - first_key, dx_row, d, bm, bd)
            for row in range(first_query, last_query, bm):
                x = _load_rows(q, width, row, last_query, d, bm, bd) * _load_scales(q_scale, row, last_query, bm)
                dy_row = _load_rows(dy, d, row, last_query, d, bm, bd)
                u, slope, _ = _gelu_and_derivatives(tl.dot(x, w1_j, input_precision=prec))
                da = tl.dot(dy_row, w2_j, input_precision=prec) * slope
                dw1 = tl.dot(tl.trans(x), da, dw1, input_precision=prec)
                dw2 = tl.dot(tl.trans(dy_row), u, dw2, input_precision=prec)
                dx_row = tl.dot(da, tl.trans(w1_j), input_precision=prec)
                if j > 0:
                    dx_row += _load_rows(dx_q, d, row - first_query, last_query - first_query, d, bm, bd)
                _store_rows(dx_q, d, row - first_query, last_query - first_query, dx_row, d, bm, bd)
            _store_columns(dw, j, dw1, d, h, bd, bh)
            _store_columns(dw + layer, j, dw2, d, h, bd, bh)
            _store_columns(dz, j, eta[:, None] * dz1, d, h, bd, bh)
            _store_columns(dz + layer, j, eta[:, None] * dz2, d, h, bd, bh)
        tl.debug_barrier()

        for row in range(first_key, last_key, bm):
            dx_row = _load_rows(dx_k, d, row - first_key, last_key - first_key, d, bm, bd)
            x, scale = _load_rows(k, width, row, last_key, d, bm, bd), _load_scales(k_scale, row, last_key, bm)
            _store_rows(dk, width, row, last_key, _through_norm(x, scale, dx_row), d, bm, bd)
        for row in range(first_query, last_query, bm):
            dx_row = _load_rows(dx_q, d, row - first_query, last_query - first_query, d, bm, bd)
            x, scale = _load_rows(q, width, row, last_query, d, bm, bd), _load_scales(q_scale, row, last_query, bm)
            _store_rows(dq, width, row, last_query, _through_norm(x, scale, dx_row), d, bm, bd)
        tl.debug_barrier()  # the next step writes over de and dx


@lru_cache(maxsize=64)
def _plan(read: ReadOrder, tokens: int, chunk_length: int, device: torch.device) -> Tensor:
    """The steps as (first key, last key, first query, last query), (steps, 4)."""
    rows = [(k.start, k.stop, q.start, q.stop) for k, q in steps(read, tokens, chunk_length)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _tiles(d: int, backward: bool) -> dict[str, int | str]:
    """Tiles that spill few registers, none up to d = 32 and in the forward pass 64, and fit 100 KB of shared memory."""
    wide = d > 64
    precise = torch.get_float32_matmul_precision() == "highest"
    return {
        "bm": 16 if wide and backward else 32,
        "bd": max(16, triton.next_power_of_2(d)),
        "bh": 16 if wide or backward else 32,
        "prec": "tf32x3" if precise else "tf32",  # float32 products on tensor cores, in three parts or rounded
        "num_warps": 8 if d > 32 and backward else 4,
        "num_stages": 1,
    }


def fits(qkv: Tensor, d: int) -> bool:
    """Whether the kernels take these tokens, (B, N, 3d), and this device."""
    if qkv.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(qkv.device) < (8, 0)):
        return False
    return d <= LARGEST_DIM and qkv.is_contiguous() and qkv.dtype in (torch.float32, torch.bfloat16, torch.float16)


def forward(given: Given, settings: Settings, keep: bool) -> tuple[Tensor, Kept]:
    """The context, and what is kept, for contiguous qkv and a reading order that updates at least once.

    Without `keep` there is room for two states, and all that is kept is scratch.
    """
    qkv, start, generator_weight, generator_bias = given
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    plan = _plan(settings.read, tokens, settings.chunk_length, qkv.device)
    y = qkv.new_empty(images, tokens, d)
    of_states, *others, _ = kept_shapes(images, tokens, d, h, settings)
    room = of_states if keep else (min(of_states[0], 2), *of_states[1:])
    states, surprises, factors, errors = (start.new_empty(shape) for shape in (room, *others))
    scales = reciprocal_norms(qkv, d, start.dtype)
    _forward_kernel[(images,)](
        qkv, scales, start, generator_weight, generator_bias, plan, y, states, surprises, factors, errors,
        images, tokens, errors.shape[1], len(plan), settings.inner_lr,
        d=d, h=h, keep_states=keep, **_tiles(d, backward=False),
    )  # fmt: skip
    return y, Kept(states, surprises, factors, errors, scales)


def backward(dy: Tensor, given: Given, kept: Kept, settings: Settings) -> Gradients:
    """Gradients of what was given, for contiguous dy and qkv."""
    qkv, start, generator_weight, _ = given
    (images, tokens, _), (_, d, h) = qkv.shape, start.shape
    states, _, factors, errors, scales = kept
    count, written = len(states), errors.shape[1]
    longest = min(settings.chunk_length, tokens)
    plan = _plan(settings.read, tokens, settings.chunk_length, qkv.device)
    d_qkv = torch.empty_like(qkv)
    d_qkv[:, written:, d:] = 0.0
    d_logits = torch.empty_like(factors)
    dw, dz = start.new_zeros(2, images, d, h), start.new_zeros(2, images, d, h)
    de, dx = start.new_empty(images, longest, d), start.new_empty(images, 2, longest, d)
    _backward_kernel[(images,)](
        dy, qkv, scales, start, generator_weight, plan, states, factors, errors, d_qkv, d_logits, dw, dz, de, dx,
        images, tokens, written, longest, len(plan), count, settings.inner_lr,
        d=d, h=h, **_tiles(d, backward=True),
    )  # fmt: skip
    return Gradients(d_qkv, dw.sum(1), d_logits)
