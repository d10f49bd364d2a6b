"""muP: initial weights and steps with which one learning rate serves all widths of a shape.

Maximal update parametrization (Yang et al., arXiv 2203.03466, table 3, the one without multipliers in the forward pass)
for AdamW. With m = width / base width, a matrix whose both sides grow starts at m^-1/2 of its size and is stepped by
1/m of the learning rate; the head starts at 1/m and is stepped by 1/m; what is fed by a fixed number of inputs stays as
it is: biases, norms, layer scale, the stem, depthwise filters (49 inputs at any width). At m = 1 nothing changes.

The memory is derived here. Queries and keys have length 1, so their entries are of order d^-1/2, and what they feed,
W1, may be larger by m^1/2 than a matrix whose inputs are of order 1. One inner step of size theta then moves
a = k W1 by theta |e W2^T| and y = u W2 by theta |u|^2 |e|, with |u|^2 of order d: the two layers want step sizes that
differ by a factor of m, and there is but one. Values that carry a factor c = m^1/2, and with them W2, the errors e and
the context y, make up for it, because the first step grows by c^2 and the second by 1: with inner_lr / m both move
what they write by order 1. The projection to q, k and v as a whole carries c, since q and k lose it when they are
normalised; the generator, which reads e^2, gives c^2 back, the recomposition, which reads y, c.

Adam's eps is scaled like the gradient that it is compared with (Everett et al., arXiv 2407.05872): changing all entries
of a tensor by its step changes the loss by order 1, so a gradient is of order 1 / (entries x step). The decay of a
step is learning rate times weight_decay, here as in PyTorch; weight_decay is divided by the scale of the learning rate,
so that all widths forget weights equally fast (Wang and Aitchison, arXiv 2405.13698).

Depth is not covered: a residual stream of more blocks takes more updates a step. `ModelConfig.depth_warning` says so.
"""

from typing import Any, NamedTuple

import torch
from torch import nn


class Rule(NamedTuple):
    """How a parameter follows the width.

    Attributes:
        sides: how many of its dimensions grow with the width.
        initial: exponent of m that what `ConvNeur` draws without muP is multiplied with.
        lr: exponent of m that the learning rate is multiplied with.
    """

    sides: int
    initial: float
    lr: float


VECTOR, MATRIX = Rule(1, 0, 0), Rule(2, -1 / 2, -1)
RULES = {
    "stem.0.weight": VECTOR,
    "downsample.1.weight": MATRIX,
    "local_branch.dwconv.weight": VECTOR,
    "local_branch.up.weight": MATRIX,
    "local_branch.down.weight": MATRIX,
    "global_branch.reduce.weight": MATRIX,
    "memory.qkv_weight": Rule(2, 0, -1 / 2),
    "memory.qkv_bias": Rule(1, 1 / 2, 1 / 2),
    "memory.w1": Rule(2, 1 / 2, -1 / 2),  # drawn at d^-1/2 and (4 d)^-1/2, so the same at every width
    "memory.w2": Rule(2, 1 / 2, -1 / 2),
    "memory.generator_weight": Rule(2, -3 / 2, -2),
    "global_branch.expand.weight": Rule(2, -1, -3 / 2),
    "project.weight": MATRIX,
    "head.fc.weight": Rule(1, -1, -1),
    "head.fc.bias": Rule(0, 0, 0),
}


def rule(name: str, parameter: nn.Parameter) -> Rule:
    """The rule of a parameter; vectors that RULES doesn't name are all alike. KeyError for a matrix without a rule."""
    ending = next((ending for ending in RULES if name.endswith(ending)), None)
    if ending is None and parameter.ndim > 1:
        raise KeyError(f"{name} has no rule for muP")
    return RULES[ending] if ending else VECTOR


@torch.no_grad()
def scale_initial_weights(model: nn.Module, width_factor: float) -> None:
    """Turns freshly drawn weights into those of muP, in place."""
    for name, parameter in model.named_parameters():
        parameter.mul_(width_factor ** rule(name, parameter).initial)


def parameter_groups(model: nn.Module, width_factor: float, weight_decay: float, eps: float) -> list[dict[str, Any]]:
    """Groups for AdamW: lr_scale, by which timm's schedules multiply a group's learning rate, weight_decay and eps.

    Vectors don't decay and come first; at the base width they and the rest are the only two groups.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        sides, _, lr = rule(name, parameter)
        key = parameter.ndim > 1, width_factor**lr, width_factor ** (-sides - lr)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": lr_scale,
            "weight_decay": weight_decay / lr_scale if decays else 0.0,
            "eps": eps * gradient_scale,
        }
        for (decays, lr_scale, gradient_scale), parameters in sorted(groups.items(), key=lambda group: group[0][0])
    ]
