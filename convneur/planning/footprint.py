"""The memory of a rank: what DeepSpeed 0.19.8 keeps under each ZeRO stage, around a traced step.

What is held all the time follows from the stage. On top come, at different times, activations, gradients, DeepSpeed's
buckets and what it copies on the way; the peak is the most of them together. The formulas are what the tensors of real
runs in two processes were seen to take; benchmarks/planner.py holds them against such runs.

Names: P parameters, N ranks. All sizes are bytes of one rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convneur.engine.methods import METHODS
from convneur.engine.section import offloads_optimizer
from convneur.planning.step_trace import Moment, Precision, Trace

FLOAT, HALF = 4, 2
PREFETCH = 50_000_000  # elements that ZeRO 3 gathers at once: DeepSpeed's stage3_prefetch_bucket_size
PERSISTENT = 100_000  # elements up to which ZeRO 3 keeps a parameter whole: stage3_param_persistence_threshold


@dataclass(frozen=True)
class Footprint:
    """What a rank holds at the moment of a step at which it holds most.

    Attributes:
        weights: what the forward pass computes with; this rank's share of it under ZeRO 3.
        optimizer: float32 masters, where they aren't the weights themselves, and moments.
        averages: the moving average of the weights.
        gradients: of parameters.
        buckets: DeepSpeed's buffers for reducing gradients, and copies that it makes on the way.
        gathered: parameters of other ranks, under ZeRO 3.
        activations: all else: what the backward pass needs, what passes, and autocast's copies of weights.
        memory_states: the part of the activations that are states of the neural memory.
        when: the moment, in words.
    """

    weights: int
    optimizer: int
    averages: int
    gradients: int
    buckets: int
    gathered: int
    activations: int
    memory_states: int
    when: str

    @property
    def total(self) -> int:
        """All of it; the states are part of the activations."""
        parts = self.weights, self.optimizer, self.averages, self.gradients, self.buckets, self.gathered
        return sum(parts) + self.activations


@dataclass(frozen=True)
class Layout:
    """What decides on memory beside the model and its micro-batch.

    Attributes:
        stage: of ZeRO, 0 to 3.
        ranks: N.
        precision: of the step.
        averages: whether a moving average is kept.
        bucket: elements of a bucket, DeepSpeed's reduce_bucket_size.
        offload: whether the optimizer's state is in the host's memory.
        accumulates: whether a step has several micro-batches, whose gradients are added up.
        moments: float32 numbers that the optimizer keeps for every parameter.
    """

    stage: int
    ranks: int
    precision: Precision
    averages: bool
    bucket: int
    offload: bool
    accumulates: bool = False
    moments: int = METHODS["adamw"].moments


def layout(
    section: dict[str, Any], stage: int, ranks: int, precision: Precision, averages: bool, method: str = "adamw"
) -> Layout:
    """The layout that a complete deepspeed section asks for, under a ZeRO stage that may be another one."""
    zero = section.get("zero_optimization", {})
    offload = offloads_optimizer(section) and stage > 0
    accumulates = section["gradient_accumulation_steps"] > 1
    bucket, moments = int(zero["reduce_bucket_size"]), METHODS[method].moments
    return Layout(stage, ranks, precision, averages, bucket, offload, accumulates, moments)


def peak(trace: Trace, how: Layout) -> Footprint:
    """What a rank holds in the last micro-batch of a step after the first, when the optimizer has its moments."""
    return _peak(trace.shapes, trace.moments, trace.memory_states, how)


def host_bytes(params: int, how: Layout) -> int:
    """What an offloaded optimizer takes of the host's memory for a rank: master, moments and gradient, and its sum."""
    return (2 + how.moments + how.accumulates) * FLOAT * params // how.ranks if how.offload else 0


def largest_micro_batch(small: tuple[int, Trace], large: tuple[int, Trace], how: Layout, capacity: int) -> int:
    """The most images of a micro-batch that fit into `capacity` bytes; 0 if not even one does.

    Activations grow in proportion to the images, moment by moment, so two traced sizes tell of all others.
    """
    (few, a), (many, b) = small, large

    def fits(images: int) -> bool:
        share = (images - few) / (many - few)

        def between(x: int, y: int) -> int:
            return round(x + share * (y - x))

        pairs = zip(a.moments, b.moments, strict=True)
        moments = tuple(Moment(between(x.high, y.high), x.grown, x.name) for x, y in pairs)
        return _peak(a.shapes, moments, between(a.memory_states, b.memory_states), how).total <= capacity

    least, most = 0, 1
    while fits(most) and most < 2**20:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


@dataclass(frozen=True)
class _Held:
    """Bytes that a rank holds throughout a step; names as in `Footprint`.

    Attributes:
        persisted: the part of `gathered` that ZeRO 3 never lets go.
        buckets: while gradients are reduced.
    """

    weights: int
    optimizer: int
    averages: int
    gradients: int
    persisted: int
    buckets: int


def _held(shapes: dict[str, Any], how: Layout, size: int) -> _Held:
    """What stays, where the weights take `size` bytes an element."""
    params = sum(shape.numel() for shape in shapes.values())
    full, share = FLOAT * params, FLOAT * params // how.ranks  # a float32 number for every parameter, and this rank's
    weights = size * params
    optimizer = 0 if how.offload else how.moments * share
    if how.stage == 0:
        optimizer = how.moments * full
    elif not how.offload:
        optimizer += share
    averages = full if how.averages else 0
    bucket = FLOAT * how.bucket
    if how.stage == 3:
        persistent = sum(n for shape in shapes.values() if (n := shape.numel()) <= PERSISTENT)
        # The gradients are a flat buffer that stays. A bucket for each precision that they are reduced in.
        buckets = {"fp32": bucket, "autocast": bucket + bucket // 2}.get(how.precision, bucket // 2)
        return _Held(weights // how.ranks, optimizer, averages // how.ranks, share, size * persistent, buckets)
    if how.stage == 1 and how.precision == "bf16":  # DeepSpeed's BF16_Optimizer
        # Added up in a flat buffer that stays, as do those of the backward pass, for zeros.
        return _Held(weights, optimizer, averages, full + weights, 0, 0)
    # From the first to the last gradient; autocast has two precisions.
    buckets = (2 if how.precision == "autocast" else 1) * size * how.bucket if how.stage else 0
    return _Held(weights, optimizer, averages, 0, 0, buckets)


def _peak(shapes: dict[str, Any], moments: tuple[Moment, ...], states: int, how: Layout) -> Footprint:
    params = sum(shape.numel() for shape in shapes.values())
    own_half = how.precision in ("bf16", "fp16")  # DeepSpeed's own modes: the weights themselves are half precision
    size = HALF if own_half else FLOAT
    held = _held(shapes, how, size)
    earlier, in_backward_pass, reducing = _gradients(how, size, params)

    def at(when: str, activations: int, grads: int = 0, copies: int = 0, gathered: int = 0) -> Footprint:
        # ZeRO 1 reduces only in the last micro-batch what has been added up from the first one on.
        in_backward = how.stage == 3 or when != "forward pass" or (how.stage == 1 and how.accumulates)
        return Footprint(
            weights=held.weights,
            optimizer=held.optimizer,
            averages=held.averages,
            gradients=held.gradients + earlier + grads,
            buckets=(held.buckets if in_backward else 0) + copies,
            gathered=held.persisted + gathered,
            activations=activations,
            memory_states=min(states, activations),
            when=when,
        )

    forward, *backward = moments
    if how.stage == 3:
        others = held.weights * how.ranks - held.persisted
        # The backward pass gathers parameters anew: so many at once, into one tensor, of autocast's precision, and from
        # there.
        part = min(1.0, PREFETCH / params) / (2 if how.precision == "autocast" else 1)
        kept = min(forward.high, backward[0].high)
        gathering = at("start of the backward pass", kept, gathered=others + round(part * others))
        moved = min(FLOAT * how.bucket, FLOAT * params) // (1 if how.precision == "fp32" else 2)
        found = [gathering, at("forward pass", forward.high, gathered=others)]
        found.append(at("end of the backward pass", 0, copies=moved, gathered=others))
    else:
        others, found = 0, [at("forward pass", forward.high), at("end of the backward pass", 0, *reducing)]
    grown = 0
    for moment in backward:
        before, grown = grown, grown + moment.grown
        fills = how.stage == 2 and grown // how.bucket > before // how.bucket  # a bucket, which is reduced in a copy
        copies = size * how.bucket if fills else 0
        found.append(at("backward pass", moment.high, in_backward_pass(before), copies, others))
    return max(found, key=lambda footprint: footprint.total)


def _gradients(how: Layout, size: int, params: int) -> tuple[int, Callable[[int], int], tuple[int, int]]:
    """Bytes of gradients under ZeRO 0 to 2, where those of a parameter take `size` bytes an element.

    Returns:
        Those of earlier micro-batches, held throughout; those held beside them while the backward pass runs and so many
        elements are complete; and at its end, when they are reduced, those held and copies of them.
    """
    full, bucket = size * params, size * how.bucket
    share, piece = full // how.ranks, min(bucket, full // how.ranks)
    if how.stage == 0:  # as the weights; all are reduced in one flat copy
        copies = full if how.ranks > 1 else 0
        if how.accumulates:
            return full, lambda grown: 0, (0, copies)
        return 0, lambda grown: size * grown, (full, copies)
    if how.stage == 3 or (how.stage == 1 and how.precision == "bf16"):  # in buffers that stay, and are reduced whole
        return 0, lambda grown: 0, (0, (FLOAT + HALF) * params)
    if how.stage == 2 and how.precision == "bf16":  # reduced in half precision, added up in float32
        own = FLOAT * params // how.ranks
        if how.accumulates:
            return own, lambda grown: 0, (0, min(bucket, full))
        return 0, lambda grown: own if grown > how.bucket else 0, (own, min(bucket, full))
    copies = piece if bucket > share else 0  # a bucket with gradients of several ranks is taken apart
    copies += piece // 2 if how.precision == "autocast" else 0
    if how.stage == 1:
        left = max(0, full - bucket) + share
        if how.accumulates:
            return full, lambda grown: 0, (left - full, copies)
        return 0, lambda grown: size * grown, (left, copies)
    # In the buckets; what has been reduced is in this rank's share, apart from that of earlier micro-batches.
    earlier = share if how.accumulates and not how.offload else 0
    return earlier, lambda grown: share if grown > how.bucket else 0, (share, copies)
