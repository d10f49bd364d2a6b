"""Persistent buffers of a model, such as BatchNorm's running statistics: the same on every rank after every step.

Forward passes change them on each rank in its own way, and DeepSpeed leaves them so. After every step floats are set to
their mean over the ranks, as timm's `--dist-bn reduce` does once an epoch, and all others, such as counts of batches,
to rank 0's. A step that is skipped leaves them as they were before it. So what is saved, evaluated or compared between
two steps is the same on all ranks, and doing that changes nothing: averaged only there, a run that was stopped and
saved would go on with other values than one that wasn't.

Buffers that aren't persistent are no part of a model's state: whoever builds the model makes them, nobody saves them,
and here they are left alone.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from convneur.data.errors import InputError

Flats = dict[torch.dtype, Tensor]


class Buffers:
    """The persistent buffers of the model in an engine; of no size where it has none, as ConvNeur.

    Attributes:
        flats: their values after the last step, those of each dtype in one tensor (elements,).
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: dict[torch.dtype, dict[str, tuple[nn.Module, str]]] = {}
        for name, owner, key in _persistent(module):
            self._places.setdefault(getattr(owner, key).dtype, {})[name] = owner, key
        self.flats = self._read()

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    @torch.no_grad()
    def settle(self, skipped: Tensor | bool) -> None:
        """Takes in a step that has been made, or skipped. Collective.

        Args:
            skipped: whether it was; a flag on the device, such as () float32, isn't waited for.
        """
        for dtype, now in self._read().items():
            if dtype.is_floating_point:
                total = now.double()  # exact for values that are equal on all ranks
                dist.all_reduce(total)
                now = (total / dist.get_world_size()).to(dtype)
            else:
                dist.broadcast(now.view(torch.uint8), 0)
            if torch.is_tensor(skipped):
                now = torch.where(skipped.bool(), self.flats[dtype], now)
            elif skipped:
                now = self.flats[dtype]
            self._write(dtype, now)

    def named(self, flats: Flats | None = None) -> dict[str, Tensor]:
        """Copies of the buffers by name; floats as float32 at least.

        Args:
            flats: other values than the model's own, laid out like `self.flats`; such as averages.
        """
        flats = self._read() if flats is None else flats
        split = (self._split(dtype, widened(flats[dtype])) for dtype in self._places)
        return {name: value.clone() for values in split for name, value in values}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Takes over values by name; there may be others among them. InputError where one is missing or doesn't fit."""
        for dtype, flat in self.laid_out(values).items():
            self._write(dtype, flat.to(dtype))

    def laid_out(self, values: Mapping[str, Tensor]) -> Flats:
        """What `named` has returned, laid out like `flats`, floats as float32 at least.

        Raises InputError where one is missing or of another shape.
        """
        flats = {}
        for dtype, flat in self.flats.items():
            pieces = []
            for name, own in self._split(dtype, flat):
                if name not in values or values[name].shape != own.shape:
                    raise InputError(f"the checkpoint is of another model: buffer {name} is missing or misshapen")
                pieces.append(values[name].to(flat.device).reshape(-1))
            flats[dtype] = widened(torch.cat(pieces))
        return flats

    def _read(self) -> Flats:
        """The values that the model has now; its buffers are looked up anew, as a module may exchange one."""
        return {dtype: torch.cat([buffer.reshape(-1) for buffer in self._own(dtype)]) for dtype in self._places}

    def _own(self, dtype: torch.dtype) -> list[Tensor]:
        return [getattr(owner, key).detach() for owner, key in self._places[dtype].values()]

    def _write(self, dtype: torch.dtype, flat: Tensor) -> None:
        self.flats[dtype] = flat
        torch._foreach_copy_(self._own(dtype), [value for _, value in self._split(dtype, flat)])

    def _split(self, dtype: torch.dtype, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        own = self._own(dtype)
        parts = flat.split([buffer.numel() for buffer in own])
        for name, part, buffer in zip(self._places[dtype], parts, own, strict=True):
            yield name, part.view(buffer.shape)


def widened(values: Tensor) -> Tensor:
    """Floats as float32 at least; anything else as it is."""
    return values.float() if values.is_floating_point() and values.element_size() < 4 else values


def _persistent(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name in the state_dict, owner, and the owner's name of every buffer that a state_dict holds."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, _ in owner.named_buffers(recurse=False, remove_duplicate=False):
            if key not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{key}".removeprefix("."), owner, key
