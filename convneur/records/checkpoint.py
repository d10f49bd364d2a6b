"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00000460`:

    manifest.json           sizes and SHA-256 of all other files; a folder without it is not a checkpoint
    config.yaml             the run's configuration
    classes.json            names of the classes, in the order of the logits; older checkpoints have none
    state.json              step, position in the data, engine settings, versions
    model.safetensors       whole float32 weights, with the configuration in the file's metadata
    ema.safetensors         whole averaged weights, likewise
    buffers.safetensors     persistent buffers, such as running statistics; none of a model without any, as ConvNeur
    ema-buffers.safetensors averaged ones, likewise
    optimizer/*.safetensors whole moments, one file each, such as exp_avg
    optimizer.json          steps by parameter, loss scale

DeepSpeed's own checkpoints are not used: they fit one world size and ZeRO stage, are pickles, and are written in place.
These fit every stage and world size, and each rank reads of the files what it needs. The ranks share the writing.

All is written under a temporary name, flushed and hashed; the manifest is written; only then the folder gets its name.
A kill at any instant leaves the previous checkpoints as they were. A rank that fails doesn't leave the others waiting:
all of them raise, and the run may go on. What has another name beside them, such as a copy that somebody keeps, is no
checkpoint of the run and is left alone.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file

from convneur.config import Config, config_text, save_config
from convneur.data.errors import InputError
from convneur.data.files import atomic_write, fsync
from convneur.engine.ema import Ema
from convneur.engine.engine import Engine, Weights
from convneur.engine.state import gather, gather_scalars, moment_names, restore
from convneur.errors import NonFiniteError, SaveError
from convneur.records.folder import (
    BUFFERS_FILE,
    CLASSES_FILE,
    CONFIG_FILE,
    EMA_BUFFERS_FILE,
    EMA_FILE,
    MANIFEST,
    MODEL_FILE,
    MOMENTS,
    OPTIMIZER_FILE,
    STATE_FILE,
)
from convneur.records.listing import checkpoint_name, holds_one
from convneur.records.manifest import digest
from convneur.records.retention import Best, Retention
from convneur.records.upkeep import TEMPORARY, follow_up, free_name, remove_leftovers
from convneur.system.agreement import together
from convneur.system.world import World

_log = logging.getLogger(__name__)


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

    def record(self) -> dict[str, Any]:
        """What is written of it."""
        return asdict(self) | {"best": self.best and self.best.record()}


def read_state(checkpoint: Path) -> TrainState:
    """The state in a checkpoint folder; InputError where the folder is none."""
    path = checkpoint / STATE_FILE
    try:
        fields = json.loads(path.read_text())
        return TrainState(**fields | {"best": Best.of(fields["best"]) if fields["best"] else None})
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


def save_checkpoint(
    folder: Path,
    config: Config,
    world: World,
    engine: Engine,
    ema: Ema | None,
    state: TrainState,
    retention: Retention,
    classes: Sequence[str] = (),
    warn: Callable[[str], None] = _log.warning,
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
        warn: is told on rank 0 what else couldn't be done once the checkpoint was committed, such as removing others.

    Returns:
        The folder of the new checkpoint.

    Raises:
        NonFiniteError: the weights are not finite; a checkpoint of them would only push out a good one.
        SaveError: a rank couldn't write or read back its part, such as on a full disk. The previous checkpoints are
            untouched, and what had been written is removed.
    """
    final = folder / checkpoint_name(state.step)
    files = _gather_files(engine, ema, world, state)
    values: dict[str, object] = {
        STATE_FILE: state.record(),
        OPTIMIZER_FILE: gather_scalars(engine),
        CLASSES_FILE: classes,
    }
    temporary = _make_temporary(final, world)
    try:
        digests: dict[str, dict[str, Any]] = {}
        with together(world, SaveError, "writing the checkpoint"):
            digests = _write_part(temporary, config, files, values if world.is_main else {})
        entries = [digests] * world.size
        dist.all_gather_object(entries, digests, world.control)
        with together(world, SaveError, "committing the checkpoint"):
            if world.is_main:
                _write_json({name: entry for part in entries for name, entry in part.items()}, temporary / MANIFEST)
                _publish(temporary, final)
    except SaveError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if world.is_main:
        follow_up(final, retention, state.best, warn)
    return final


def load_checkpoint(checkpoint: Path, engine: Engine, ema: Ema | None) -> None:
    """Restores weights, optimizer and average from an intact checkpoint of any world size and ZeRO stage. Collective.

    The files are mapped into memory, not read: each rank reads its part.

    Raises:
        InputError: it is of another model, or holds no average where one is kept.
    """
    scalars = json.loads((checkpoint / OPTIMIZER_FILE).read_text())
    names = sorted(name for name in json.loads((checkpoint / MANIFEST).read_bytes()) if name.startswith(f"{MOMENTS}/"))
    moments = {Path(name).stem: load_file(checkpoint / name) for name in names}
    restore(engine, load_weights(checkpoint, averaged=False), moments, scalars)
    if ema:
        ema.load_full_model(load_weights(checkpoint, averaged=True))


def load_weights(checkpoint: Path, averaged: bool) -> Weights:
    """Whole float32 weights, and buffers, of a checkpoint, raw or averaged; InputError where they are not there.

    They are mapped, and not compared with the manifest: `newest_intact` or `check_files` has done that before.
    """
    weights, buffers = (checkpoint / name for name in weights_files(averaged))
    if not weights.is_file():
        raise InputError(f"{weights} is missing: the run kept no {'average of its weights' if averaged else 'weights'}")
    return load_file(weights) | (load_file(buffers) if buffers.is_file() else {})


def weights_files(averaged: bool) -> tuple[str, str]:
    """Names of the files with the raw or the averaged weights, and with the buffers, if there are any."""
    return (EMA_FILE, EMA_BUFFERS_FILE) if averaged else (MODEL_FILE, BUFFERS_FILE)


def _gather_files(engine: Engine, ema: Ema | None, world: World, state: TrainState) -> dict[str, Weights]:
    """Names and contents, in this rank's memory, of the files that this rank is to write. Collective."""
    contents: dict[str, Callable[[], Weights]] = {MODEL_FILE: partial(gather, engine)}
    contents |= {EMA_FILE: ema.full_weights} if ema else {}
    contents |= {f"{MOMENTS}/{moment}.safetensors": partial(gather, engine, moment) for moment in moment_names(engine)}
    if len(engine.buffers):
        contents |= {BUFFERS_FILE: engine.buffers.named} | ({EMA_BUFFERS_FILE: ema.full_buffers} if ema else {})
    files = {}
    for i, (name, content) in enumerate(contents.items()):
        weights = content()
        if name in (MODEL_FILE, EMA_FILE) and not all(w.isfinite().all() for w in weights.values()):
            raise NonFiniteError(f"the weights are no longer finite after {state.step} steps; nothing was saved")
        if name in (BUFFERS_FILE, EMA_BUFFERS_FILE) and any(b.isnan().any() for b in weights.values()):  # inf may mask
            raise NonFiniteError(f"the buffers hold a NaN after {state.step} steps; nothing was saved")
        if i % world.size == world.rank:
            files[name] = {key: weight.cpu() for key, weight in weights.items()}
    return files


def _make_temporary(final: Path, world: World) -> Path:
    """A folder to write a checkpoint in, the same for all ranks; SaveError where it can't be made. Collective."""
    temporary = final.with_name(f"{TEMPORARY}{final.name}")
    with together(world, SaveError, "making a folder for the checkpoint"):
        if world.is_main:
            remove_leftovers(final.parent)
            temporary = free_name(temporary)
            try:
                (temporary / MOMENTS).mkdir(parents=True)
            except OSError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    agreed = [temporary]
    dist.broadcast_object_list(agreed, group=world.control)
    return agreed[0]


def _write_part(
    folder: Path, config: Config, files: dict[str, Weights], values: dict[str, object]
) -> dict[str, dict[str, Any]]:
    """Writes this rank's files: weights and, if there are any, values and the configuration; returns their digests."""
    for name, weights in files.items():
        _write_weights(weights, config, folder / name)
    if values:
        save_config(config, folder / CONFIG_FILE)
    for name, value in values.items():
        _write_json(value, folder / name)
    return {name: digest(folder / name) for name in (*files, *values, *([CONFIG_FILE] if values else []))}


def _write_weights(weights: Weights, config: Config, path: Path) -> None:
    save_file({name: w.contiguous() for name, w in weights.items()}, path, metadata={"config": config_text(config)})
    fsync(path)


def _write_json(value: object, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, sort_keys=True).encode())


def _publish(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name. Another that has it goes; a link, file or foreign folder steps aside."""
    for folder in (temporary / MOMENTS, temporary):
        fsync(folder)
    before = None
    if os.path.lexists(final):
        own = holds_one(final) and not final.is_symlink()
        aside = f"{TEMPORARY}removed-{final.name}" if own else f"{final.name}.aside"
        before = final.rename(free_name(final.with_name(aside)))
    try:
        temporary.rename(final)
    except OSError:
        if before:
            before.rename(final)
        raise
