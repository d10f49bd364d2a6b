"""What the two passes of every implementation take and return.

Shape legend: B images, N tokens, M written tokens, U updates, d memory width, h hidden width. W2 is held transposed, so
that the weights of a memory are one tensor (2, d, h), and the update factors scale the same axis of both.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from convneur.ops.memory.reading import ReadOrder, updates, written_tokens


class Settings(NamedTuple):
    """Numbers that a memory keeps.

    Attributes:
        chunk_length: tokens a chunk, L.
        inner_lr: scale of the inner step size.
        read: reading order.
    """

    chunk_length: int
    inner_lr: float
    read: ReadOrder


class Given(NamedTuple):
    """What a memory computes with, in the precision of its state.

    Attributes:
        qkv: queries, keys and values (B, N, 3d), in any precision.
        start: W1 and W2^T of M_0, (2, d, h).
        generator_weight: of the update generator, (3d, d).
        generator_bias: (3d,).
    """

    qkv: Tensor
    start: Tensor
    generator_weight: Tensor
    generator_bias: Tensor


class Kept(NamedTuple):
    """What a forward pass leaves for the backward pass, in the precision of the state.

    Attributes:
        states: weights and velocities after each update, W1 and W2^T of both, (U, 2, 2, B, d, h).
        surprises: (U, B, d).
        factors: what the update generator makes of the surprises, its sigmoids (U, B, 3d).
        errors: e of the tokens that are written, (B, M, d).
        scales: reciprocal norms of queries and of the keys that are written, (B, N, 2, 1).
    """

    states: Tensor
    surprises: Tensor
    factors: Tensor
    errors: Tensor
    scales: Tensor


class Gradients(NamedTuple):
    """What a backward pass returns.

    Attributes:
        qkv: of queries, keys and values, (B, N, 3d), in their precision.
        start: of M_0, (2, d, h).
        logits: of the update generator's, before its sigmoid, (U, B, 3d).
    """

    qkv: Tensor
    start: Tensor
    logits: Tensor


class Implementation(Protocol):
    """A module that computes the recurrence."""

    def forward(self, given: Given, settings: Settings, keep: bool) -> tuple[Tensor, Kept]:
        """The context (B, N, d) in the precision of qkv, and what is kept; only if `keep` is there anything in that."""

    def backward(self, dy: Tensor, given: Given, kept: Kept, settings: Settings) -> Gradients:
        """Gradients, from that of the context, (B, N, d), and what the forward pass kept."""


def kept_shapes(images: int, tokens: int, d: int, h: int, settings: Settings) -> list[tuple[int, ...]]:
    """Shapes of what is kept, in the order of `Kept`."""
    count = updates(settings.read, tokens, settings.chunk_length)
    return [
        (count, 2, 2, images, d, h),
        (count, images, d),
        (count, images, 3 * d),
        (images, written_tokens(settings.read, tokens, settings.chunk_length), d),
        (images, tokens, 2, 1),
    ]
