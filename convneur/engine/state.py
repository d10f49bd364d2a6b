"""An engine's state as whole tensors, one a parameter, and back: the same under every ZeRO stage and world size.

DeepSpeed spreads the float32 masters of the parameters, and the optimizer state that goes with them, over flat tensors
of its own. `pieces` says where in them this rank keeps what. Everything else here follows from that, so that state
which was gathered under one stage and world size is equal to the bit after loading under any other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from convneur.data.errors import InputError
from convneur.engine.engine import Engine, Weights, true_shape
from convneur.engine.loss_scale import LossScaler

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + length` of a parameter, as one of the optimizer's own tensors holds them.

    Attributes:
        name: of the parameter.
        start: first element, of the parameter flattened.
        length: elements.
        flat: the tensor that the optimizer steps: the parameter itself under ZeRO 0, this rank's partition of many of
            them under ZeRO 1 to 3.
        offset: where in `flat`.
        group: the optimizer's parameter group.
    """

    name: str
    start: int
    length: int
    flat: Tensor
    offset: int
    group: int

    def view(self, values: Tensor) -> Tensor:
        """The piece, (length,), of a tensor that is laid out like `flat`: a moment, or `flat` itself."""
        return values.detach().view(-1)[self.offset : self.offset + self.length]

    def take(self, whole: Tensor, values: Tensor) -> None:
        """Copies the piece out of a whole parameter, or a moment of it, into such a tensor."""
        self.view(values).copy_(whole.reshape(-1)[self.start : self.start + self.length])


def pieces(engine: Engine) -> Iterator[Piece]:
    """What this rank's optimizer holds of each parameter; nothing where ZeRO has given all of it to other ranks."""
    stage, optimizer, rank = engine.stage, engine.deepspeed.optimizer, dist.get_rank()
    groups = {p: i for i, group in enumerate(engine.deepspeed.basic_optimizer.param_groups) for p in group["params"]}
    for name, parameter in engine.module.named_parameters():
        size = true_shape(parameter).numel()
        if stage == 0:
            yield Piece(name, 0, size, parameter, 0, groups[parameter])
        elif stage == 3:
            sub_group, offset, held = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = min(rank * held, size)  # ZeRO 3 pads every parameter to a multiple of the world size
            flat = optimizer.fp32_partitioned_groups_flat[sub_group]
            group = optimizer.sub_group_to_group_id[sub_group]
            yield Piece(name, start, min(held, size - start), flat, offset, group)
        elif (mapping := parameter._hp_mapping) is not None:
            # DeepSpeed's own bf16 mode has, under ZeRO 1, an optimizer of another class.
            flats = getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            group = mapping.param_group_index
            yield Piece(name, here.start, here.numel, flats[group], there.start, group)


def moment_names(engine: Engine) -> list[str]:
    """What the optimizer keeps for every element of the weights, such as exp_avg; nothing before its first step."""
    state = engine.deepspeed.basic_optimizer.state
    return sorted({k for flat in state for k, v in state[flat].items() if torch.is_tensor(v) and v.shape == flat.shape})


@torch.no_grad()
def gather(engine: Engine, moment: str | None = None) -> Weights:
    """Every parameter's float32 master, or a moment of it, whole, on every rank's device. Collective."""
    shapes = {name: true_shape(parameter) for name, parameter in engine.module.named_parameters()}
    state, held = engine.deepspeed.basic_optimizer.state, list(pieces(engine))
    sources = [p.flat if moment is None else state.get(p.flat, {}).get(moment) for p in held]
    dtype = next((source.dtype for source in sources if source is not None), torch.float32)
    sizes = [shape.numel() for shape in shapes.values()]
    whole = torch.zeros(sum(sizes), dtype=dtype, device=engine.device)
    parts = dict(zip(shapes, whole.split(sizes), strict=True))
    for piece, source in zip(held, sources, strict=True):
        if source is not None:  # under ZeRO 0 a parameter without gradients has no moments yet
            parts[piece.name][piece.start : piece.start + piece.length] = piece.view(source)
    if engine.stage:
        dist.all_reduce(whole.view(torch.uint8))  # bytes: adding floats would turn -0 into 0
    return {name: part.view(shapes[name]) for name, part in parts.items()}


def gather_model(engine: Engine) -> Weights:
    """What the model's `state_dict` would hold: float32 masters, whole, and persistent buffers. Collective."""
    return gather(engine) | engine.buffers.named()


def gather_scalars(engine: Engine) -> dict[str, Any]:
    """What else an optimizer resumes from, the same on every rank: steps made by parameter, and the loss scale."""
    steps = _steps(engine)
    scaler = _loss_scaler(engine)
    scale: dict[str, Any] = {}  # empty where losses aren't scaled
    if isinstance(scaler, GradScaler | LossScaler):
        scale = scaler.state_dict()
    elif getattr(scaler, "dynamic", False):
        scale = {field: getattr(scaler, field) for field in LOSS_SCALER_FIELDS}
    return {
        "steps": steps,
        "loss_scale": scale,
        "global_steps": engine.deepspeed.global_steps,
        "skipped_steps": engine.deepspeed.global_steps
        - max(steps.values()),  # under ZeRO 0 DeepSpeed doesn't count them
    }


def steps_made(engine: Engine) -> int:
    """How many steps the optimizer has made, those that were skipped left out. Collective."""
    return max(_steps(engine).values())


def _steps(engine: Engine) -> dict[str, int]:
    names = [name for name, _ in engine.module.named_parameters()]
    steps = torch.zeros(len(names), dtype=torch.int64, device=engine.device)
    inner = engine.deepspeed.basic_optimizer
    for piece in pieces(engine):
        # Some optimizers count steps by parameter, others by group; `_set_step` may have set the other.
        counts = inner.state.get(piece.flat, {}), inner.param_groups[piece.group]
        steps[names.index(piece.name)] = max(int(count.get("step", 0)) for count in counts)
    dist.all_reduce(steps, dist.ReduceOp.MAX)
    return dict(zip(names, steps.tolist(), strict=True))


@torch.no_grad()
def restore(
    engine: Engine, masters: Mapping[str, Tensor], moments: Mapping[str, Weights], scalars: dict[str, Any]
) -> None:
    """Gives every rank its part of a gathered state. Collective.

    Args:
        engine: fresh, or one that has trained.
        masters: what `gather_model` returned; reading a value may load it.
        moments: by their names, the same of the optimizer's moments.
        scalars: what `gather_scalars` returned.

    Raises:
        InputError: the state is of another model.
    """
    engine.buffers.load(masters)
    inner, held, steps = engine.deepspeed.basic_optimizer, list(pieces(engine)), scalars["steps"]
    if {piece.name for piece in held} - steps.keys():
        raise InputError("the checkpoint's optimizer state is of another model")
    flat_steps: dict[Tensor, int] = {}
    for piece in held:
        flat_steps[piece.flat] = max(flat_steps.get(piece.flat, 0), steps[piece.name])
        piece.take(masters[piece.name], piece.flat)
        if step := flat_steps[piece.flat]:  # else there is nothing yet: it has never been stepped
            state = inner.state[piece.flat]
            for moment, weights in moments.items():
                if moment not in state:
                    state[moment] = torch.zeros_like(piece.flat, dtype=weights[piece.name].dtype)
                piece.take(weights[piece.name], state[moment])
            _set_step(inner, inner.param_groups[piece.group], piece.flat, step)

    deepspeed, optimizer = engine.deepspeed, engine.deepspeed.optimizer
    if engine.stage == 3:
        optimizer.checkpoint_event_prologue()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    elif engine.stage:
        optimizer.update_lp_params()

    scale, scaler = scalars["loss_scale"], _loss_scaler(engine)
    if isinstance(scaler, GradScaler | LossScaler) and "scale" in scale:
        scaler.load_state_dict(scale)
    elif getattr(scaler, "dynamic", False) and "cur_scale" in scale:
        for name, value in scale.items():
            setattr(scaler, name, value)
    deepspeed.global_steps, deepspeed.skipped_steps = scalars["global_steps"], scalars["skipped_steps"]
    deepspeed.global_samples = deepspeed.global_steps * deepspeed.train_batch_size()


def _loss_scaler(engine: Engine) -> Any:
    """What keeps the scale of the losses; None, or one that isn't dynamic, where nothing does."""
    return engine.deepspeed.torch_autocast_z0_gradscaler or getattr(engine.deepspeed.optimizer, "loss_scaler", None)


def _set_step(optimizer: torch.optim.Optimizer, group: dict[str, Any], flat: Tensor, step: int) -> None:
    """Sets the count of steps where the optimizer looks for it.

    torch's optimizers keep a tensor for each parameter, on the device where a fused kernel reads it, and timm's one for
    the group; DeepSpeed's keep a number for each parameter, apex's one for the group.
    """
    library = type(optimizer).__module__.partition(".")[0]
    if library == "torch":
        on_device = group.get("fused") or group.get("capturable")
        optimizer.state[flat]["step"] = torch.tensor(float(step), device=flat.device if on_device else "cpu")
    elif library == "timm":
        group["step"] = torch.tensor(float(step))
    else:
        optimizer.state[flat]["step"] = group["step"] = step
