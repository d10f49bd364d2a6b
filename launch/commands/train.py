"""`convneur train`: as a launcher it starts ranks, as a rank it trains."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from convneur.data.errors import InputError
from convneur.launch.flags import add_config, add_json, add_launch
from convneur.launch.imports import importing
from convneur.launch.parser import RANKS, Overrides, Parsers, add_command
from convneur.launch.preflight import check, check_beginnings, check_start
from convneur.launch.rank import is_rank, joined_world, keep_lock
from convneur.launch.signals import stoppable
from convneur.launch.streams import outlast_output
from convneur.records.folder import CONFIG_FILE, SUMMARY_FILE
from convneur.records.summary import Summary, read_summary
from convneur.system.determinism import set_determinism

if TYPE_CHECKING:
    from convneur.config import Config
    from convneur.system.world import World


def add(parsers: Parsers) -> None:
    """Adds the command."""
    train = add_command(
        parsers,
        "train",
        run,
        "Train a model; see below for the configuration keys.",
        takes_overrides=True,
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_Help, help="show this help and exit")
    add_config(train)
    add_launch(train)
    train.add_argument(
        "--resume",
        default="never",
        metavar="never|auto|PATH",
        help="never: a new run, in a new folder (default); auto: go on with the run of this name if there is one;"
        " PATH: a new run from that checkpoint, or from another run's newest",
    )
    train.add_argument(
        "--profile", action="store_true", help="trace a few steps: profile/trace.json in the run's folder, and a table"
    )
    train.add_argument(
        "--reproduce",
        type=Path,
        metavar="RUN",
        help="repeat a run, in a new folder: its configuration, and as many ranks; refuses where code, packages, data"
        " or hardware differ",
    )
    train.add_argument("--allow-differences", action="store_true", help="with --reproduce: say what differs, and go on")
    train.add_argument(
        "--check",
        type=RANKS,
        metavar="RANKS",
        help="only check configuration and data, for a run of that many ranks",
    )
    add_json(train, "with --check, print the run's folder and whether the run is finished, as JSON")
    # How a batch script, which starts a run again by the same words, says what --resume says to others.
    train.add_argument("--begin", help=argparse.SUPPRESS)
    train.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)  # how a launcher tells its ranks the folder


class _Help(argparse.Action):
    """Shows the flags of `convneur train`, then every configuration key."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Prints, and exits."""
        from convneur.launch.key_help import key_help

        print(f"{parser.format_help()}\nconfiguration keys, in a file or as flags:\n\n{key_help()}")
        parser.exit()


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur train`: as a launcher, checks everything that needs no ranks, then starts them; as a rank, trains."""
    outlast_output()
    from convneur.config import load_config

    config = _repeated(args, overrides) if args.reproduce else load_config(args.config, overrides)
    if args.check is not None:
        check_start(config, args.check)
        folder = Path(config.run.root) / config.run.name
        if args.begin:
            check_beginnings([config], args.begin)
        if args.json:
            print(json.dumps({"folder": str(folder), "finished": _finished(config) is not None}))
        return 0
    if is_rank(args):
        return _train_rank(config, args)
    with stoppable():
        return _launch(config, args)


def _launch(config: "Config", args: argparse.Namespace) -> int:
    from convneur.config import save_config
    from convneur.launch.folder import run_folder
    from convneur.launch.local import rank_count, run_ranks

    if args.resume == "auto" and _conclude_finished(config):
        return 0
    nproc = rank_count(args.nproc)
    check(config, nproc)
    with (
        run_folder(config.run, args.resume) as (folder, lock),
        TemporaryDirectory(prefix="convneur-config-") as temporary,
    ):
        resolved = Path(temporary) / CONFIG_FILE  # one file for all ranks, whatever happens to the user's
        save_config(config, resolved)
        words = ["train", "--config", str(resolved), "--resume", args.resume, "--run-dir", str(folder)]
        words += ["--profile"] if args.profile else []
        before = _finish_mark(folder)
        status = run_ranks(words, nproc, lock)
        # A signal that came when all was done has stopped nothing.
        return 0 if status > 128 and _finish_mark(folder) not in (None, before) else status


def _finish_mark(folder: Path) -> int | None:
    """Changes when a run ends."""
    try:
        return (folder / SUMMARY_FILE).stat().st_mtime_ns
    except OSError:
        return None


def _repeated(args: argparse.Namespace, overrides: Overrides) -> "Config":
    """The configuration of the run to repeat, once this machine and this checkout are what that one was made with."""
    from convneur.launch.local import rank_count, set_thread_count
    from convneur.records.provenance import differences, read_record, record, recorded_config
    from convneur.system.world import name_accelerator

    name_accelerator()
    if args.config:
        raise InputError(f"--config {args.config[0]} and --reproduce exclude each other: the run has its configuration")
    then = read_record(args.reproduce)
    config = recorded_config(then, overrides)
    if not is_rank(args):
        args.nproc = rank_count(args.nproc or then["hardware"]["world_size"])
        set_thread_count(args.nproc)
    now = record(config, int(os.environ["WORLD_SIZE"]) if is_rank(args) else args.nproc)
    differing = differences(then, now)
    for line in differing if os.environ.get("RANK", "0") == "0" else ():
        print(f"differs: {line}", flush=True)
    if differing and not args.allow_differences:
        raise InputError(
            f"{args.reproduce} was made with something else, in {len(differing)} respects: see above;"
            " --allow-differences goes on all the same"
        )
    return config


def _train_rank(config: "Config", args: argparse.Namespace) -> int:
    with importing():
        set_determinism(config.run.determinism)
        from convneur.system.world import name_accelerator

        name_accelerator()
        from convneur.run.resume import agreed_start
        from convneur.train import train

    with joined_world() as world:
        with _agreed_folder(config, args, world) as folder:
            resume = agreed_start(folder, args.begin, world) if args.begin else args.resume
            summary = train(config, world, folder, resume, args.profile)
        if world.is_main and summary:
            _conclude(summary, config, folder)
    return 0


@contextmanager
def _agreed_folder(config: "Config", args: argparse.Namespace, world: "World") -> Iterator[Path]:
    """The run's folder: what the launcher has chosen, else what rank 0 chooses now."""
    if args.run_dir:
        keep_lock(args.run_dir)
        yield args.run_dir
        return
    from torch.distributed import broadcast_object_list

    from convneur.launch.folder import run_folder
    from convneur.system.agreement import led

    check(config, world.size)
    agreed = [Path()]
    with ExitStack() as stack:
        with led(world):
            if world.is_main:
                agreed = [stack.enter_context(run_folder(config.run, args.resume))[0]]
        broadcast_object_list(agreed, group=world.control)
        yield agreed[0]


def _conclude_finished(config: "Config") -> bool:
    """Says how this very run has ended, if it has; False if there is still something to do."""
    folder = Path(config.run.root) / config.run.name
    summary = _finished(config)
    if summary is None:
        return False
    print(f"{folder} is finished already; --run.name NAME, or leaving out --resume auto, starts another run")
    _conclude(summary, config, folder)
    return True


def _finished(config: "Config") -> Summary | None:
    """How this very run has ended, if it has."""
    from convneur.config import saved_config

    folder = Path(config.run.root) / config.run.name
    summary = read_summary(folder)
    return summary if summary and saved_config(folder / CONFIG_FILE) == config else None


def _conclude(summary: Summary, config: "Config", folder: Path) -> None:
    from convneur.tasks.metrics import CLASSIFICATION, primary_metric

    metric = primary_metric(config)
    averaged = f" ({summary.score_ema:{metric.form}} with averaged weights)" if summary.score_ema is not None else ""
    print(f"{metric.kind:11} {summary.score:{metric.form}} {metric.title} on the held-out images{averaged}")
    print(f"checkpoint  {summary.checkpoint}")
    print(f"next        convneur {'eval' if config.task.name == CLASSIFICATION else 'plot'} {folder}")
