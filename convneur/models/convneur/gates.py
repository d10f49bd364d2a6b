"""How far the gates of a model are open."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from convneur.models.convneur.block import Block, Stage


@contextmanager
def watched_gates(model: nn.Module) -> Iterator[dict[str, float]]:
    """Statistics of the gates A = sigmoid(G) in the first batch that a model sees within the block.

    Yields:
        A mapping that is filled then: mean, standard deviation, and fractions below 1/4 and above 3/4, averaged over
        the gated blocks of each stage. It stays empty where no block is gated, as in models of others.
    """
    values: dict[str, float] = {}
    hooks = []

    def watch(stage: int, blocks: list[Block]) -> None:
        def note(_: object, __: object, context: Tensor) -> None:
            gate = context.detach().float().sigmoid()
            statistics = {
                "mean": gate.mean(),
                "std": gate.std(),
                "below_quarter": (gate < 0.25).float().mean(),
                "above_three_quarters": (gate > 0.75).float().mean(),
            }
            for name, value in statistics.items():
                key = f"gate/stage{stage}_{name}"
                values[key] = values.get(key, 0.0) + value.item() / len(blocks)

        for block in blocks:
            hooks.append(block.get_submodule("global_branch").register_forward_hook(note))

    for number, stage in enumerate((module for module in model.modules() if isinstance(module, Stage)), 1):
        gated = [block for block in stage.blocks if isinstance(block, Block) and block.global_branch is not None]
        watch(number, [block for block in gated if block.fusion == "gate"])

    def stop(*_: object) -> None:
        for hook in hooks:
            hook.remove()

    hooks.append(model.register_forward_hook(stop))
    try:
        yield values
    finally:
        stop()
