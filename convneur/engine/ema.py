"""Exponential moving average of the weights, kept the way ZeRO keeps them.

timm's ModelEma averages `parameter.data`, which ZeRO 3 empties. So each rank averages the piece of every parameter
that it holds: the whole parameter under ZeRO 0 to 2, its shard under ZeRO 3. Persistent buffers, which are whole on
every rank, are averaged as timm's ModelEmaV3 does: floats like weights, while of others the last values are taken.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from convneur.engine.buffers import widened
from convneur.engine.engine import Engine, Weights, true_shape


class Ema:
    """shadow = decay * shadow + (1 - decay) * weights, in float32, after every optimizer step."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(engine.module.named_parameters())
        self.sharded = engine.stage == 3
        self.buffers = engine.buffers
        self.shadow_buffers = {dtype: widened(flat).clone() for dtype, flat in self.buffers.flats.items()}
        self.shadow = [piece.detach().float().clone() for piece in self._pieces()]

    def _pieces(self) -> list[Tensor]:
        """What this rank holds of every parameter; looked up anew because ZeRO may move its storage."""
        return [p.ds_tensor if self.sharded else p.data for p in self.parameters.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights and buffers of the step just made into the average."""
        weights = [piece.float() for piece in self._pieces()]
        torch._foreach_lerp_(self.shadow, weights, 1.0 - self.decay)
        for dtype, flat in self.buffers.flats.items():
            old, new = self.shadow_buffers[dtype], widened(flat)
            if dtype.is_floating_point:
                new = torch.where(new == old, new, torch.lerp(old, new, 1.0 - self.decay))  # infinite ones stay, too
            self.shadow_buffers[dtype] = new.clone()

    @torch.no_grad()
    def full_weights(self) -> Weights:
        """Every averaged parameter, whole, on every rank. Collective under ZeRO 3."""
        return {
            name: self._gather(piece, parameter) if self.sharded else piece
            for (name, parameter), piece in zip(self.parameters.items(), self.shadow, strict=True)
        }

    def full_model(self) -> Weights:
        """What the averaged model's `state_dict` would hold: weights and persistent buffers. Collective."""
        return self.full_weights() | self.full_buffers()

    def full_buffers(self) -> Weights:
        """Every averaged buffer."""
        return self.buffers.named(self.shadow_buffers)

    @torch.no_grad()
    def load_full_model(self, weights: Weights) -> None:
        """Takes this rank's pieces of whole averaged parameters, such as a checkpoint holds, and averaged buffers."""
        self.shadow_buffers = self.buffers.laid_out(weights)
        for (name, _), piece in zip(self.parameters.items(), self.shadow, strict=True):
            piece.copy_(self._shard(weights[name], piece) if self.sharded else weights[name])

    @staticmethod
    def _gather(piece: Tensor, parameter: nn.Parameter) -> Tensor:
        shape = true_shape(parameter)
        shards = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, piece.contiguous())
        return torch.cat(shards)[: shape.numel()].view(shape)  # ZeRO pads to a multiple of the world size

    @staticmethod
    def _shard(weight: Tensor, piece: Tensor) -> Tensor:
        start = dist.get_rank() * piece.numel()
        shard = weight.flatten()[start : start + piece.numel()].to(piece.device)
        return torch.nn.functional.pad(shard, (0, piece.numel() - shard.numel()))
