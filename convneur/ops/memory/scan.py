"""The neural memory's recurrence as one scan: the version for exported graphs that take images of any size.

equations.py has the equations, and unrolls them into as many steps as an image has chunks. A graph whose image
size is open needs the loop itself: torch.export and ONNX have a scan for that, over chunks of equal length. So the
last chunk is filled up with rows of zeros, which neither recall nor write anything; only means must leave them out.
PyTorch can't differentiate a scan of open size, so export under torch.no_grad().

Shape legend: B images, N tokens, L tokens a chunk, T = ceil(N / L) chunks, d memory width.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from convneur.ops.memory.equations import Generator, MemoryState, retrieve, update
from convneur.ops.memory.reading import ReadOrder
from convneur.ops.precision import own_precision


def recurrence(qkv: Tensor, state: MemoryState, generator: Generator, chunk_length: int, read: ReadOrder) -> Tensor:
    """The equations' `recurrence` for a number of tokens that is not known yet: (B, N, 3d) -> (B, N, d)."""
    with own_precision(qkv):
        images, tokens, _ = qkv.shape
        chunks = torch.sym_max((tokens + chunk_length - 1) // chunk_length, 2)  # exporters make 1 a constant
        q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)

        # Repeating the last token, then masking it, is padding that puts no condition on the size of the image.
        position = torch.arange(chunks * chunk_length, device=qkv.device)
        source = position.clamp(max=tokens - 1)
        valid = (position < tokens).to(q.dtype).view(chunks, 1, chunk_length, 1)

        def cut(x: Tensor) -> Tensor:
            return x.index_select(1, source).view(images, chunks, chunk_length, -1).transpose(0, 1)  # (T, B, L, d)

        def step(carry: list[Tensor], chunk: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
            before, (q_t, k_t, v_t, valid_t) = MemoryState(*carry), chunk
            count = valid_t.sum()
            after = update(before, k_t * valid_t, v_t * valid_t, generator, count.clamp(min=1))
            written = cast(tuple[Tensor, ...], after)  # an update leaves no velocity out
            context = retrieve(before if read == "before_update" else after, q_t)
            return [torch.where(count > 0, x, y) for x, y in zip(written, carry, strict=True)], context

        w1, w2 = (w.expand(images, -1, -1).clone() for w in (state.w1, state.w2))
        start = [w1, w2, torch.zeros_like(w1), torch.zeros_like(w2)]
        last, context = _scan(step, start, (cut(q), cut(k), cut(v), valid))
        if read == "final_state":
            return retrieve(MemoryState(*last), q).to(qkv.dtype)
        whole = context.transpose(0, 1).reshape(images, chunks * chunk_length, -1)
        return whole.index_select(1, torch.arange(tokens, device=qkv.device)).to(qkv.dtype)


def _scan(
    step: Callable[[list[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]], tuple[list[Tensor], Tensor]],
    start: list[Tensor],
    chunks: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[list[Tensor], Tensor]:
    result: tuple[list[Tensor], Tensor] = scan(step, start, chunks)
    return result
