"""A slow, obvious neural memory to test the fast one against: a literal reading of the paper.

One image at a time, one token at a time, float64, and the inner gradient by torch.func.grad instead of a closed
form. It shares no code with `convneur.ops.memory.equations` and takes the same parameters by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, Tensor]


def recall(weights: Weights, x: Tensor) -> Tensor:
    """M(x) for one token x (d,)."""
    w1, w2 = weights
    return F.gelu(x @ w1) @ w2


def reconstruction_loss(weights: Weights, keys: Tensor, values: Tensor) -> Tensor:
    """Mean over the chunk's tokens of |M(k) - v|^2."""
    errors = [recall(weights, k) - v for k, v in zip(keys, values, strict=True)]
    return sum((e @ e for e in errors), torch.zeros((), dtype=keys.dtype)) / len(errors)


def write(weights: Weights, velocity: Weights, keys: Tensor, values: Tensor, p: dict[str, Tensor], inner_lr: float):
    """M_t and Z_t from M_{t-1}, Z_{t-1} and one chunk."""
    g1, g2 = torch.func.grad(reconstruction_loss)(weights, keys, values)
    errors = torch.stack([recall(weights, k) - v for k, v in zip(keys, values, strict=True)])
    surprise = (errors**2).mean(0)
    factors = torch.sigmoid(p["generator_weight"] @ surprise + p["generator_bias"])
    d = keys.shape[1]
    theta, eta, alpha = inner_lr * factors[:d], factors[d : 2 * d], factors[2 * d :]
    # diag(.) from the left scales rows of W1, from the right columns of W2: the d axis of each.
    z1 = torch.diag(eta) @ velocity[0] - torch.diag(theta) @ g1
    z2 = velocity[1] @ torch.diag(eta) - g2 @ torch.diag(theta)
    w1 = torch.diag(1 - alpha) @ weights[0] + z1
    w2 = weights[1] @ torch.diag(1 - alpha) + z2
    return (w1, w2), (z1, z2)


def reference_memory(tokens: Tensor, p: dict[str, Tensor], *, chunk_length: int, inner_lr: float, read: str) -> Tensor:
    """Context (B, N, d) for tokens (B, N, d); p maps the parameter names of NeuralMemory to float64 tensors."""
    images = []
    for image in tokens:
        d = image.shape[1]
        qkv = image @ p["qkv_weight"].T + p["qkv_bias"]
        q, k, v = qkv[:, :d], qkv[:, d : 2 * d], qkv[:, 2 * d :]
        q = torch.stack([x / x.norm() for x in q])
        k = torch.stack([x / x.norm() for x in k])
        weights = (p["w1"], p["w2"])
        velocity = (torch.zeros_like(p["w1"]), torch.zeros_like(p["w2"]))
        outputs = []
        for start in range(0, len(image), chunk_length):
            chunk = slice(start, start + chunk_length)
            before = weights
            weights, velocity = write(weights, velocity, k[chunk], v[chunk], p, inner_lr)
            if read == "before_update":
                outputs += [recall(before, x) for x in q[chunk]]
            elif read == "after_update":
                outputs += [recall(weights, x) for x in q[chunk]]
        if read == "final_state":
            outputs = [recall(weights, x) for x in q]
        images.append(torch.stack(outputs))
    return torch.stack(images)
