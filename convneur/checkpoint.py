"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00000460`:

    manifest.json           sizes and SHA-256 of all other files; a folder without it is not a checkpoint
    config.yaml             the run's configuration
    classes.json            names of the classes, in the order of the logits; older checkpoints have none
    state.json              step, position in the data, engine settings, versions
    model.safetensors       whole float32 weights, with the configuration in the file's metadata
    ema.safetensors         whole averaged weights, likewise
    optimizer/*.safetensors whole moments, one file each, such as exp_avg
    optimizer.json          steps by parameter, loss scale

DeepSpeed's own checkpoints are not used: they fit one world size and ZeRO stage, are pickles, and are written in place.
These fit every stage and world size, and each rank reads of the files what it needs. The ranks share the writing.

All is written under a temporary name, flushed and hashed; the manifest is written; only then the folder gets its name.
A kill at any instant leaves the previous checkpoints as they were. A rank that fails doesn't leave the others waiting:
all of them raise, and the run may go on.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file, save_file

from convneur.agreement import together
from convneur.config import Config, config_text, save_config
from convneur.data.errors import InputError
from convneur.data.files import atomic_write, fsync
from convneur.ema import Ema
from convneur.engine import Weights
from convneur.engine_state import gather, gather_scalars, moment_names, restore
from convneur.errors import NonFiniteError, SaveError
from convneur.retention import Best, Retention
from convneur.world import World

CHECKPOINTS = "checkpoints"
"""Their folder in that of a run."""

MANIFEST = "manifest.json"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
CLASSES_FILE = "classes.json"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
MOMENTS = "optimizer"
OPTIMIZER_FILE = "optimizer.json"
LATEST = "LATEST"
_PREFIX = "step-"
_TEMPORARY = "tmp-"


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("convneur", "deepspeed", "torch")}


@dataclass(frozen=True)
class TrainState:
    """What a run is resumed from, besides weights and optimizer state.

    Attributes:
        step: optimizer steps made; the next one is number `step`.
        seconds: time spent on the run so far, over all its starts.
        data: the loader's account of the sample stream.
        engine: ZeRO stage, world size and accumulation; under the same ones a resumed run is equal to the bit.
        best: the best evaluation so far, if there was any.
        went_back: whether the run has gone back to a checkpoint once; it does so no second time.
        versions: of the packages that wrote it.
    """

    step: int
    seconds: float
    data: dict[str, Any]
    engine: dict[str, Any]
    best: Best | None = None
    went_back: bool = False
    versions: dict[str, str] = field(default_factory=_versions)


def read_state(checkpoint: Path) -> TrainState:
    """The state in a checkpoint folder; InputError where the folder is none."""
    path = checkpoint / STATE_FILE
    try:
        fields = json.loads(path.read_text())
        return TrainState(**fields | {"best": Best(**fields["best"]) if fields["best"] else None})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{checkpoint} is not a checkpoint: {path} can't be read ({error}); expected a folder step-<number>"
        ) from error


def read_classes(checkpoint: Path) -> tuple[str, ...]:
    """Names of the classes that a checkpoint tells apart, in the order of its logits; none where it doesn't say.

    Raises InputError where the file is damaged.
    """
    path = checkpoint / CLASSES_FILE
    if not path.exists():
        return ()
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}): restore it") from error
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{path} holds no list of names: restore it")
    return tuple(names)


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in a folder, newest first; unfinished ones are not among them.

    A folder with such a name was whole when it got it. What it has lost since, `newest_intact` finds.
    """
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def find_checkpoint(path: Path) -> Path:
    """A checkpoint given as its own folder or as a run's, whose newest is taken; InputError where there is none."""
    if (path / MANIFEST).is_file():
        return path
    found = [checkpoint for checkpoint in list_checkpoints(path / CHECKPOINTS) if (checkpoint / MANIFEST).is_file()]
    if not found:
        raise InputError(
            f"no checkpoint in {path}: expected a folder step-<number> with a {MANIFEST}, or a run's folder"
        )
    return found[0]


def save_checkpoint(
    folder: Path,
    config: Config,
    world: World,
    engine: DeepSpeedEngine,
    ema: Ema | None,
    state: TrainState,
    retention: Retention,
    classes: Sequence[str] = (),
) -> Path:
    """Writes, flushes, hashes and only then names a checkpoint; then removes those that need not be kept. Collective.

    Args:
        folder: the run's checkpoint folder, shared by all ranks.
        config: the run's configuration, saved with it.
        world: this process among the ranks.
        engine: weights and optimizer state.
        ema: averaged weights, if the run keeps any.
        state: position of the run.
        retention: which checkpoints stay.
        classes: names of the classes, in the order of the logits.

    Returns:
        The folder of the new checkpoint.

    Raises:
        NonFiniteError: the weights are not finite; a checkpoint of them would only push out a good one.
        SaveError: a rank couldn't write or read back its part, such as on a full disk. The previous checkpoints are
            untouched, and what had been written is removed.
    """
    final = folder / f"{_PREFIX}{state.step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    files = _gather_files(engine, ema, world, state)
    scalars = gather_scalars(engine)
    try:
        with together(world, SaveError, "making a folder for the checkpoint"):
            if world.is_main:
                for left_over in folder.glob(f"{_TEMPORARY}*"):
                    shutil.rmtree(left_over)
                (temporary / MOMENTS).mkdir(parents=True)
        digests: dict[str, dict[str, Any]] = {}
        with together(world, SaveError, "writing the checkpoint"):
            for name, weights in files.items():
                _write_weights(weights, config, temporary / name)
            if world.is_main:
                save_config(config, temporary / CONFIG_FILE)
                _write_json(asdict(state), temporary / STATE_FILE)
                _write_json(scalars, temporary / OPTIMIZER_FILE)
                _write_json(classes, temporary / CLASSES_FILE)
            mine = [*files, *((CONFIG_FILE, STATE_FILE, OPTIMIZER_FILE, CLASSES_FILE) if world.is_main else ())]
            digests = {name: _digest(temporary / name) for name in mine}
        entries = [digests] * world.size
        dist.all_gather_object(entries, digests, world.control)
        with together(world, SaveError, "committing the checkpoint"):
            if world.is_main:
                _write_json({name: digest for part in entries for name, digest in part.items()}, temporary / MANIFEST)
                _publish(temporary, final)
                _write_text(f"{final.name}\n", folder / LATEST)
        with together(world, SaveError, "removing old checkpoints"):
            if world.is_main:
                remove_obsolete(folder, state.step, retention, state.best)
    except SaveError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def remove_obsolete(folder: Path, current: int, retention: Retention, best: Best | None) -> None:
    """Removes the checkpoints that need not stay beside that of step `current`, just written. One rank does it."""
    if best:
        best.write(folder)
    by_step = {checkpoint_step(path): path for path in list_checkpoints(folder)}
    for step in retention.obsolete(list(by_step), current, best.step if best else None):
        _remove(by_step[step])


def newest_intact(checkpoints: list[Path], world: World) -> tuple[Path | None, list[str]]:
    """The first of `checkpoints` whose every byte is as written, and what is wrong with those before it. Collective.

    Rank 0's list counts; every rank hashes its share of the files, and all come to the same answer.
    """
    faults: list[str] = []
    agreed: list[list[Path]] = [checkpoints]
    dist.broadcast_object_list(agreed, group=world.control)
    for checkpoint in agreed[0]:
        found: list[list[str]] = [[] for _ in range(world.size)]
        dist.all_gather_object(found, list(_damage(checkpoint, world.rank, world.size)), world.control)
        damage = [fault for part in found for fault in part]
        if not damage:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {'; '.join(damage)}")
    return None, faults


def load_checkpoint(checkpoint: Path, engine: DeepSpeedEngine, ema: Ema | None) -> None:
    """Restores weights, optimizer and average from an intact checkpoint of any world size and ZeRO stage. Collective.

    The files are mapped into memory, not read: each rank reads its part.

    Raises:
        InputError: it is of another model, or holds no average where one is kept.
    """
    scalars = json.loads((checkpoint / OPTIMIZER_FILE).read_text())
    moments = {path.stem: load_file(path) for path in sorted((checkpoint / MOMENTS).glob("*.safetensors"))}
    restore(engine, load_weights(checkpoint, averaged=False), moments, scalars)
    if ema:
        ema.load_full_weights(load_weights(checkpoint, averaged=True))


def load_weights(checkpoint: Path, averaged: bool) -> Weights:
    """Whole float32 weights of a checkpoint, raw or averaged; InputError where they are not there."""
    path = checkpoint / (EMA_FILE if averaged else MODEL_FILE)
    if not path.is_file():
        raise InputError(f"{path} is missing: the run kept no {'average of its weights' if averaged else 'weights'}")
    return load_file(path)


def _gather_files(engine: DeepSpeedEngine, ema: Ema | None, world: World, state: TrainState) -> dict[str, Weights]:
    """Names and contents, in this rank's memory, of the files that this rank is to write. Collective."""
    names = [MODEL_FILE, *([EMA_FILE] if ema else []), *(f"{MOMENTS}/{m}.safetensors" for m in moment_names(engine))]
    files = {}
    for i, name in enumerate(names):
        weights = ema.full_weights() if ema and name == EMA_FILE else gather(engine, _moment(name))
        if name in (MODEL_FILE, EMA_FILE) and not all(w.isfinite().all() for w in weights.values()):
            raise NonFiniteError(f"the weights are no longer finite after {state.step} steps; nothing was saved")
        if i % world.size == world.rank:
            files[name] = {key: weight.cpu() for key, weight in weights.items()}
    return files


def _moment(name: str) -> str | None:
    return None if name == MODEL_FILE else Path(name).stem


def _write_weights(weights: Weights, config: Config, path: Path) -> None:
    save_file({name: w.contiguous() for name, w in weights.items()}, path, metadata={"config": config_text(config)})
    fsync(path)


def _write_json(value: object, path: Path) -> None:
    _write_text(json.dumps(value, indent=2, sort_keys=True), path)


def _write_text(text: str, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _publish(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name; one that is there already was found damaged, or it would not be redone."""
    for folder in (temporary / MOMENTS, temporary):
        fsync(folder)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    fsync(final.parent)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; killed in the middle, it leaves nothing that looks like one."""
    unnamed = checkpoint.with_name(f"{_TEMPORARY}removed-{checkpoint.name}")
    checkpoint.rename(unnamed)
    shutil.rmtree(unnamed)


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
