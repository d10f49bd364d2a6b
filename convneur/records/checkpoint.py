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
all of them raise, and the run may go on. What has another name beside them, such as a copy that somebody keeps, is no
checkpoint of the run and is left alone.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

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
    BEST,
    CHECKPOINTS,
    CLASSES_FILE,
    CONFIG_FILE,
    EMA_FILE,
    LATEST,
    MANIFEST,
    MODEL_FILE,
    MOMENTS,
    OPTIMIZER_FILE,
    STATE_FILE,
)
from convneur.records.retention import Best, Retention
from convneur.system.agreement import together
from convneur.system.world import World

_STEP = r"step-(?:[0-9]{8}|[1-9][0-9]{8,})"
_NAME = re.compile(_STEP)
_TEMPORARY = "tmp-"
_LEFTOVER = re.compile(rf"{_TEMPORARY}(?P<removed>removed-)?(?P<name>{_STEP})(?:-[0-9]+)?")
_log = logging.getLogger(__name__)
T = TypeVar("T")
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What says that there is no such file; other errors say nothing about it."""
_NEEDED = {CONFIG_FILE, STATE_FILE, MODEL_FILE, OPTIMIZER_FILE}


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


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint of a step."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in a folder, newest first; unfinished ones and other names are not among them.

    Neither is a folder that holds nothing of a checkpoint. A folder with such a name was whole when it got it. What it
    has lost since, `newest_intact` finds. InputError where the folder is there but can't be read.
    """
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and _holds_one(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} can't be read ({error.strerror}), expected a run's checkpoints") from error
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(path: Path) -> Path:
    """A checkpoint given as its own folder or as a run's, whose newest is taken; InputError where there is none."""
    if (path / MANIFEST).is_file():
        return path
    found = list_checkpoints(path / CHECKPOINTS)
    if not found:
        raise InputError(
            f"no checkpoint in {path}: expected a folder step-<number> with a {MANIFEST}, or a run's folder"
        )
    return found[0]


def check_files(checkpoint: Path, *names: str) -> None:
    """Raises InputError where one of these files of a checkpoint is not as it was written, or is missing."""
    faults = _damage(checkpoint, lambda written: [name for name in names if name in written])
    if fault := next(faults, None):
        raise InputError(f"{checkpoint} is damaged: {fault}; restore it, or name another checkpoint")


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
    temporary = folder / f"{_TEMPORARY}{final.name}"
    files = _gather_files(engine, ema, world, state)
    scalars = gather_scalars(engine)
    try:
        with together(world, SaveError, "making a folder for the checkpoint"):
            if world.is_main:
                _remove_leftovers(folder)
                temporary = _free(temporary)
                (temporary / MOMENTS).mkdir(parents=True)
        agreed = [temporary]
        dist.broadcast_object_list(agreed, group=world.control)
        (temporary,) = agreed
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
    except SaveError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if world.is_main:
        _account(final, retention, state.best, warn)
    return final


def _account(final: Path, retention: Retention, best: Best | None, warn: Callable[[str], None]) -> None:
    """What follows a commit: it stands, whatever becomes of this, which is made up for after the next one."""
    try:
        fsync(final.parent)
    except OSError as error:
        warn(f"{final} is saved, but may not outlast a failure of this machine ({error})")
    try:
        _write_text(f"{final.name}\n", final.parent / LATEST)
    except OSError as error:
        warn(f"{final} is saved, but {LATEST} can't say so ({error})")
    try:
        remove_obsolete(final.parent, checkpoint_step(final), retention, best, warn)
        _remove_leftovers(final.parent)
        for left_over in _leftovers(final.parent):
            warn(f"{left_over} can't be removed; it is of no use to the run")
    except (OSError, InputError) as error:
        warn(f"{final} is saved, but what is no longer needed beside it can't be found ({error})")


def remove_obsolete(
    folder: Path, current: int, retention: Retention, best: Best | None, warn: Callable[[str], None]
) -> None:
    """Removes the checkpoints that need not stay beside that of step `current`, which is intact. One rank does it.

    `BEST` names a checkpoint that is there, or there is none. What can't be written or removed goes to `warn`.
    """
    by_step = {checkpoint_step(path): path for path in list_checkpoints(folder)}
    if current not in by_step:
        return
    try:
        if retention.best and best and best.step in by_step:
            best.write(folder)
        else:
            (folder / BEST).unlink(missing_ok=True)
    except OSError as error:
        warn(f"{folder / BEST} can't be written ({error})")
        return  # what it names stays
    own = [step for step, path in by_step.items() if not path.is_symlink()]  # a link is somebody's
    for step in retention.obsolete(own, current, best.step if best else None):
        try:
            _remove(by_step[step])
        except OSError as error:
            warn(f"{by_step[step]} is no longer needed, but can't be removed wholly ({error})")


def restore_replaced(folder: Path) -> None:
    """Gives a run's only checkpoint its name back, if a kill came as another was to replace it. One rank does it."""
    for left_over in _leftovers(folder):
        match = _LEFTOVER.fullmatch(left_over.name)
        if match and match["removed"] and (left_over / MANIFEST).is_file():
            original = folder / match["name"]
            if not os.path.lexists(original) and not list_checkpoints(folder):
                with suppress(OSError):
                    left_over.rename(original)


def _holds_one(path: Path) -> bool:
    return any((path / name).is_file() for name in (MANIFEST, STATE_FILE, MODEL_FILE))


def _leftovers(folder: Path) -> list[Path]:
    """Folders that interrupted saves and removals have left; what else has a similar name is somebody's."""
    named = (path for path in folder.glob(f"{_TEMPORARY}*") if _LEFTOVER.fullmatch(path.name))
    return [path for path in named if path.is_dir() and not path.is_symlink()]


def _remove_leftovers(folder: Path) -> None:
    """Removes what interrupted saves have left. What can't be, such as an open file on NFS, is tried the next time."""
    for left_over in _leftovers(folder):
        with suppress(OSError):
            shutil.rmtree(left_over, ignore_errors=True)


def _free(path: Path) -> Path:
    """The first of PATH, PATH-2, PATH-3, ... at which there is nothing."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in count(1))
    return next(name for name in names if not os.path.lexists(name))


def newest_intact(checkpoints: list[Path], world: World) -> tuple[Path | None, list[str]]:
    """The first of `checkpoints` whose every byte is as written, and what is wrong with those before it. Collective.

    Rank 0's list counts; every rank hashes its share of the files, and all come to the same answer.

    Raises:
        StorageError: the storage of one before it doesn't answer. It may be intact, so the next isn't taken for it.
        InputError: a file of one before it is there, but may not be read.
    """
    faults: list[str] = []
    agreed: list[list[Path]] = [checkpoints]
    dist.broadcast_object_list(agreed, group=world.control)
    for checkpoint in agreed[0]:
        found: list[list[str]] = [[] for _ in range(world.size)]
        mine: list[str] = []
        with together(world, InputError, "reading a checkpoint"):
            mine += _damage(checkpoint, lambda names: names[world.rank :: world.size])
        dist.all_gather_object(found, mine, world.control)
        damage = [fault for part in found for fault in part]
        if not damage:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {'; '.join(damage)}")
    return None, faults


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
        ema.load_full_weights(load_weights(checkpoint, averaged=True))


def load_weights(checkpoint: Path, averaged: bool) -> Weights:
    """Whole float32 weights of a checkpoint, raw or averaged; InputError where they are not there.

    They are mapped, and not compared with the manifest: `newest_intact` or `check_files` has done that before.
    """
    path = checkpoint / weights_file(averaged)
    if not path.is_file():
        raise InputError(f"{path} is missing: the run kept no {'average of its weights' if averaged else 'weights'}")
    return load_file(path)


def weights_file(averaged: bool) -> str:
    """Name of the file with the raw or the averaged weights."""
    return EMA_FILE if averaged else MODEL_FILE


def _gather_files(engine: Engine, ema: Ema | None, world: World, state: TrainState) -> dict[str, Weights]:
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
    """Gives a complete checkpoint its name. Another that has it goes; a link, file or foreign folder steps aside."""
    for folder in (temporary / MOMENTS, temporary):
        fsync(folder)
    before = None
    if os.path.lexists(final):
        own = _holds_one(final) and not final.is_symlink()
        aside = f"{_TEMPORARY}removed-{final.name}" if own else f"{final.name}.aside"
        before = final.rename(_free(final.with_name(aside)))
    try:
        temporary.rename(final)
    except OSError:
        if before:
            before.rename(final)
        raise


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; killed in the middle, it leaves nothing that looks like one."""
    unnamed = _free(checkpoint.with_name(f"{_TEMPORARY}removed-{checkpoint.name}"))
    checkpoint.rename(unnamed)
    shutil.rmtree(unnamed)


def _damage(checkpoint: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[str]:
    """What is wrong with a checkpoint's manifest, and with those of its files, in order of name, that are chosen.

    Raises InputError where one of them can't be read, which says nothing about what is in it.
    """
    try:
        manifest = json.loads(_read(checkpoint, MANIFEST, Path.read_bytes))
    except (*ABSENT, ValueError, RecursionError) as error:
        yield f"{MANIFEST} can't be read ({error})"
        return
    if not isinstance(manifest, dict) or not manifest.keys() >= _NEEDED:
        yield f"{MANIFEST} doesn't name the files of a checkpoint"
        return
    for name in choose(sorted(manifest)):
        try:
            if _read(checkpoint, name, _digest) != manifest[name]:
                yield f"{name} is not as it was written"
        except (*ABSENT, ValueError) as error:
            yield f"{name} can't be read ({error})"


def _read(checkpoint: Path, name: str, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file of a checkpoint; InputError where it can't be read, one of `ABSENT` without one."""
    try:
        return read(checkpoint / name)
    except ABSENT:
        raise
    except OSError as error:
        raise InputError(
            f"{checkpoint / name} can't be read ({error.strerror or error}), though nothing need be wrong with it: see"
            f" to that, then resume; if it is lost, remove {checkpoint}"
        ) from error
