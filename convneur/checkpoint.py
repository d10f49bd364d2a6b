"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00000460`:

    manifest.json        sizes and SHA-256 of all other files; written last, so a folder without it is not a checkpoint
    config.yaml          the run's configuration
    state.json           step, position in the data and engine settings
    model.safetensors    whole float32 weights       } what evaluation reads;
    ema.safetensors      whole averaged weights      } loading them executes no pickle
    deepspeed/           DeepSpeed's own files: weights and optimizer state, one or more files a rank

DeepSpeed writes in place, without flushing, and rank 0 announces a checkpoint before the others are done. So it
writes into a folder under a temporary name here; all files are flushed and hashed, the manifest is written, and only
then the folder gets its name. A kill at any instant leaves the previous checkpoints as they were.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file, save_file

from convneur.config import Config, save_config
from convneur.data.errors import InputError
from convneur.data.files import atomic_write, fsync
from convneur.ema import Ema
from convneur.engine import Weights, full_weights
from convneur.errors import NonFiniteError
from convneur.world import World

MANIFEST = "manifest.json"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
LATEST = "LATEST"
_PREFIX = "step-"
_TEMPORARY = "tmp-"


@dataclass(frozen=True)
class TrainState:
    """What a run is resumed from, besides weights and optimizer state.

    Attributes:
        step: optimizer steps made; the next one is number `step`.
        seconds: time spent on the run so far, over all its starts.
        data: the loader's account of the sample stream.
        engine: ZeRO stage, world size and accumulation; DeepSpeed's files fit these alone.
    """

    step: int
    seconds: float
    data: dict[str, Any]
    engine: dict[str, Any]


def read_state(checkpoint: Path) -> TrainState:
    """The state in a checkpoint folder; InputError where the folder is none."""
    path = checkpoint / STATE_FILE
    try:
        return TrainState(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{checkpoint} is not a checkpoint: {path} can't be read ({error}); expected a folder step-<number>"
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in a folder, newest first; unfinished ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted(
        (p for p in folder.iterdir() if p.name.startswith(_PREFIX) and (p / MANIFEST).is_file()), reverse=True
    )


def find_checkpoint(path: Path) -> Path:
    """A checkpoint given as its own folder or as a run's, whose newest is taken; InputError where there is none."""
    if (path / MANIFEST).is_file():
        return path
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise InputError(
            f"no checkpoint in {path}: expected a folder step-<number> with a {MANIFEST}, or a run's folder"
        )
    return found[0]


def save_checkpoint(folder: Path, config: Config, engine: DeepSpeedEngine, ema: Ema | None, state: TrainState) -> Path:
    """Writes, flushes, hashes and only then names a checkpoint; removes the oldest beyond `keep_checkpoints`.

    Collective. An exception leaves the previous checkpoints untouched.

    Args:
        folder: the run's checkpoint folder, shared by all ranks.
        config: the run's configuration, saved with it.
        engine: weights and optimizer state.
        ema: averaged weights, if the run keeps any.
        state: position of the run.

    Returns:
        The folder of the new checkpoint.

    Raises:
        NonFiniteError: the weights are not finite; a checkpoint of them would only push out a good one.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    name = f"{_PREFIX}{state.step:08d}"
    temporary = folder / f"{_TEMPORARY}{name}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()

    engine.save_checkpoint(str(temporary), tag="deepspeed", save_latest=False)
    weights, averaged = full_weights(engine), ema.full_weights() if ema else None
    if not all(w.isfinite().all() for w in weights.values()):
        raise NonFiniteError(f"the weights are no longer finite after {state.step} steps; nothing was saved")
    if rank == 0:
        _save_weights(weights, temporary / "model.safetensors")
        if averaged is not None:
            _save_weights(averaged, temporary / "ema.safetensors")
        save_config(config, temporary / CONFIG_FILE)
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=2))
    dist.barrier()

    files = _files(temporary)
    for path in files:
        fsync(path)  # every rank flushes every file: what a rank wrote sits in the page cache of its own node
    entries: list[dict[str, Any]] = [{} for _ in range(size)]
    dist.all_gather_object(entries, {str(p.relative_to(temporary)): _digest(p) for p in files[rank::size]})
    if rank == 0:
        manifest = {file: digest for part in entries for file, digest in part.items()}
        with atomic_write(temporary / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=2, sort_keys=True).encode())
        _publish(temporary, folder / name)
        with atomic_write(folder / LATEST) as file:
            file.write(f"{name}\n".encode())
        for old in list_checkpoints(folder)[config.run.keep_checkpoints :]:
            shutil.rmtree(old)
    dist.barrier()
    return folder / name


def newest_intact(checkpoints: list[Path], world: World) -> tuple[Path | None, list[str]]:
    """The first of `checkpoints` whose every byte is as written, and what is wrong with those before it. Collective.

    Rank 0's list counts; every rank hashes its share of the files, and all come to the same answer.
    """
    faults: list[str] = []
    agreed: list[list[Path]] = [checkpoints]
    dist.broadcast_object_list(agreed)
    for checkpoint in agreed[0]:
        found: list[list[str]] = [[] for _ in range(world.size)]
        dist.all_gather_object(found, list(_damage(checkpoint, world.rank, world.size)))
        damage = [fault for part in found for fault in part]
        if not damage:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {'; '.join(damage)}")
    return None, faults


def load_checkpoint(checkpoint: Path, engine: DeepSpeedEngine, ema: Ema | None) -> None:
    """Restores weights, optimizer and average from an intact checkpoint of the same world size and ZeRO stage."""
    path, _ = engine.load_checkpoint(str(checkpoint), tag="deepspeed", load_lr_scheduler_states=False)
    if path is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}")
    if ema:
        ema.load_full_weights(load_file(checkpoint / "ema.safetensors"))


def load_weights(checkpoint: Path, averaged: bool) -> Weights:
    """Whole float32 weights of a checkpoint, raw or averaged; InputError where they are not there."""
    path = checkpoint / ("ema.safetensors" if averaged else "model.safetensors")
    if not path.is_file():
        raise InputError(f"{path} is missing: the run kept no {'average of its weights' if averaged else 'weights'}")
    return load_file(path)


def _save_weights(weights: Weights, path: Path) -> None:
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, path)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _publish(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name; one that is there already was found damaged, or it would not be redone."""
    for folder in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
        fsync(folder)
    if final.exists():
        damaged = final.with_name(f"{_TEMPORARY}damaged-{final.name}")
        shutil.rmtree(damaged, ignore_errors=True)
        final.rename(damaged)
        shutil.rmtree(damaged)
    temporary.rename(final)
    fsync(final.parent)


def _damage(checkpoint: Path, rank: int, size: int) -> Iterator[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        yield f"{MANIFEST} can't be read ({error})"
        return
    for name in sorted(manifest)[rank::size]:
        try:
            if _digest(checkpoint / name) != manifest[name]:
                yield f"{name} is not as it was written"
        except OSError as error:
            yield f"{name} can't be read ({error})"
