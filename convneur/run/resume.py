"""Where a start of a run goes on from: which checkpoint, whether it fits, and what the best one was so far.

`--resume auto` is the run's newest. A run that is started again and again by the same words, as Slurm does, with
another checkpoint or run to begin from, begins there, and from then on it is "auto", too: `agreed_start`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from convneur.config import Config, load_config
from convneur.data.errors import DamagedError, InputError
from convneur.data.files import atomic_write
from convneur.data.format.classes import check_same_classes
from convneur.data.stream.train import TrainLoader
from convneur.records.checkpoint import TrainState, read_classes, read_state
from convneur.records.folder import BEGINNING_FILE, CHECKPOINTS, CONFIG_FILE, LATEST
from convneur.records.listing import checkpoint_name, checkpoint_step, find_checkpoint, list_checkpoints
from convneur.records.manifest import newest_intact
from convneur.records.metrics import salvage_metrics
from convneur.records.retention import Best
from convneur.records.upkeep import restore_replaced
from convneur.system.agreement import led
from convneur.system.world import World
from convneur.tasks.metrics import Metric

NEVER, AUTO = "never", "auto"


@dataclass(frozen=True)
class Position:
    """Where a start of a run goes on.

    Attributes:
        checkpoint: the intact one that it goes on from; None for initial weights.
        state: what that one knows.
        own: whether it is one of the run's own.
        best: the best evaluation so far whose weights are there; None where it isn't to be kept, or there is none.
        faults: what is wrong with checkpoints that it would rather have gone on from, or kept as the best.
        lost: steps that the run has made before without a checkpoint of them.
    """

    checkpoint: Path | None = None
    state: TrainState | None = None
    own: bool = False
    best: Best | None = None
    faults: tuple[str, ...] = ()
    lost: int = 0

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.state.step if self.state else 0


def find_position(
    config: Config,
    world: World,
    folder: Path,
    resume: str,
    loader: TrainLoader,
    classes: tuple[str, ...],
    metric: Metric,
) -> Position:
    """Where this start goes on, with a checkpoint that fits. Collective.

    Args:
        config: the run's.
        world: this process among the ranks.
        folder: the run's, which may not exist.
        resume: "never", "auto", or a checkpoint or run to start from.
        loader: must be able to go on with the checkpoint's samples.
        classes: names of the data's classes; must be the checkpoint's.
        metric: decides which evaluation is the best.

    Raises:
        StorageError: what holds a checkpoint that counts doesn't answer.
        InputError: there is no such checkpoint, or it doesn't fit.
    """
    checkpoint, faults = choose_checkpoint(folder, resume, world)
    if checkpoint is None:
        made = [record["step"] for record in salvage_metrics(folder)[0]] if resume == AUTO else []
        return Position(lost=max(made, default=0))
    state = read_state(checkpoint)
    check_fit(checkpoint, config)
    if trained := read_classes(checkpoint):
        check_same_classes(trained, classes, checkpoint, config.data.root)
    loader.check_state(state.data)
    check_length(checkpoint, state.step, config.schedule.epochs, loader.steps_per_epoch)
    best, missed = best_so_far(folder, checkpoint, state, metric, world) if config.run.keep_best else (None, [])
    own = checkpoint.parent == folder / CHECKPOINTS
    return Position(checkpoint, state, own, best, (*faults, *missed))


def check_beginning(folder: Path, begin: str) -> None:
    """Raises InputError where a run's folder has checkpoints that did not begin as asked, or there is no such start.

    Args:
        folder: the run's, which may not exist.
        begin: a checkpoint, another run, or "never" for initial weights.
    """
    if list_checkpoints(folder / CHECKPOINTS):
        if _read_beginning(folder) != _beginning(begin):
            raise InputError(
                f"{folder} has checkpoints already, of a run that did not begin with --resume {begin}: give another"
                " --run.name, or leave --resume out to go on with that run"
            )
    elif begin != NEVER:
        find_checkpoint(Path(begin))


def agreed_start(folder: Path, begin: str, world: World) -> str:
    """What to resume from now: "auto" once the run has checkpoints of its own, until then where it begins. Collective.

    Raises InputError as `check_beginning` does.
    """
    agreed = [""]
    with led(world):
        if world.is_main:
            check_beginning(folder, begin)
            own = bool(list_checkpoints(folder / CHECKPOINTS))
            if not own:
                with atomic_write(folder / BEGINNING_FILE) as file:
                    file.write(_beginning(begin).encode(errors="surrogateescape"))
            agreed = [AUTO if own else begin]
    dist.broadcast_object_list(agreed, group=world.control)
    return agreed[0]


def choose_checkpoint(folder: Path, resume: str, world: World) -> tuple[Path | None, list[str]]:
    """The intact checkpoint that `resume` asks for, and what is wrong with newer ones. Collective.

    Raises:
        StorageError: what holds the newest checkpoint, or the one asked for, doesn't answer.
        InputError: the checkpoint asked for is absent or damaged, or all of a run's checkpoints are damaged; a run
            never starts afresh in silence where it has made steps before.
    """
    if resume == NEVER:
        return None, []
    if resume == AUTO:
        with led(world):
            if world.is_main:
                restore_replaced(folder / CHECKPOINTS)
        found, latest = list_checkpoints(folder / CHECKPOINTS), folder / CHECKPOINTS / LATEST
        checkpoint, faults = newest_intact(found, world)
        if not found and latest.is_file():
            faults = [f"{latest} names {latest.read_text(errors='replace').strip()}, which is not there"]
    else:
        checkpoint, faults = newest_intact([find_checkpoint(Path(resume))], world)
    if checkpoint is None and faults:
        raise InputError(
            f"no intact checkpoint to resume from ({' | '.join(faults)}); restore one, or start with --resume never"
        )
    return checkpoint, faults


def _beginning(begin: str) -> str:
    return begin if begin == NEVER else str(Path(begin).resolve())


def _read_beginning(folder: Path) -> str | None:
    try:
        return (folder / BEGINNING_FILE).read_bytes().decode(errors="surrogateescape")
    except FileNotFoundError:
        return None


def check_fit(checkpoint: Path, config: Config) -> None:
    """Raises InputError where a checkpoint is of another model or task."""
    saved = load_config([checkpoint / CONFIG_FILE])
    for section, now, then in (("task", config.task, saved.task), ("model", config.model, saved.model)):
        before = asdict(then)
        for name, value in asdict(now).items():
            if before[name] != value:
                raise InputError(
                    f"{checkpoint} has {section}.{name} = {before[name]}, the run is configured with {value}; "
                    "use the checkpoint's setting, or start another run with --resume never"
                )


def check_length(checkpoint: Path, made: int, epochs: int, steps_per_epoch: int) -> None:
    """Raises InputError where a run would end before the step that it goes on from."""
    if made > epochs * steps_per_epoch:
        raise InputError(
            f"{checkpoint} has {made} steps made, and schedule.epochs {epochs} ends after {epochs * steps_per_epoch};"
            f" give at least {-(-made // steps_per_epoch)} epochs, or start another run with --run.name"
        )


def best_so_far(
    folder: Path, checkpoint: Path, state: TrainState, metric: Metric, world: World
) -> tuple[Best | None, list[str]]:
    """The best evaluation up to a checkpoint of which the weights are still there, intact. Collective.

    Args:
        folder: the run's.
        checkpoint: the intact one that it goes on from.
        state: what that one knows.
        metric: the one that decides.
        world: this process among the ranks.

    Returns:
        The evaluation, None where there is none; and what is wrong with the checkpoints of better ones.

    Raises:
        StorageError: what holds the checkpoint of a better one doesn't answer; without it, it would be removed.
    """
    agreed: list[list[Best]] = [[]]
    with led(world):
        if world.is_main:
            agreed = [_evaluated(folder, state, metric)]
    dist.broadcast_object_list(agreed, group=world.control)
    faults: list[str] = []
    for best in agreed[0]:
        path = folder / CHECKPOINTS / checkpoint_name(best.step)
        found, damage = (path, []) if path == checkpoint else newest_intact([path], world)
        if found:
            return best, faults
        faults += damage
    return None, faults


def _evaluated(folder: Path, state: TrainState, metric: Metric) -> list[Best]:
    """Evaluations up to a state whose checkpoints are there, best first, by what the run has left."""
    saved = {checkpoint_step(path) for path in list_checkpoints(folder / CHECKPOINTS)}
    found = {best for best in (*_in_metrics(folder, metric.name), state.best) if best}
    usable = (best for best in found if best.step in saved and best.step <= state.step)
    return sorted(usable, key=lambda best: (-metric.rank(best.score), best.step, best.weights != "raw"))


def _in_metrics(folder: Path, metric: str) -> Iterator[Best]:
    try:
        records, _ = salvage_metrics(folder)
    except DamagedError:
        return
    for record in records:
        if (score := record.get(f"eval/{metric}")) is not None:
            yield Best(record["step"], score, "raw", metric)
        if (score := record.get(f"eval/{metric}_ema")) is not None:
            yield Best(record["step"], score, "averaged", metric)
