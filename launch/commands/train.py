"""The subcommands of `convneur`, each from parsed arguments to an exit status.

They import what they need when they run: loading PyTorch, timm and DeepSpeed takes seconds that help doesn't have.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from convneur.data.errors import InputError
from convneur.launch.streams import outlast_output

if TYPE_CHECKING:
    import torch

    from convneur.config import Config
    from convneur.launch.submit import Resources
    from convneur.records.summary import Summary
    from convneur.studies.ablation import AblationConfig
    from convneur.system.world import World

Overrides = Sequence[str]
Command = Callable[[argparse.Namespace, Overrides], int]

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur train`: as a launcher, checks everything that needs no ranks, then starts them; as a rank, trains."""
    outlast_output()
    from convneur.config import load_config

    config = _repeated(args, overrides) if args.reproduce else load_config(args.config, overrides)
    if args.check is not None:
        check_start(config, args.check)
        folder = Path(config.run.root) / config.run.name
        if args.begin:
            _check_beginnings([config], args.begin)
        if args.json:
            print(json.dumps({"folder": str(folder), "finished": _finished(config) is not None}))
        return 0
    if _is_rank(args):
        return _train_rank(config, args)

    from convneur.launch.signals import stoppable

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
        resolved = Path(temporary) / "config.yaml"  # one file for all ranks, whatever happens to the user's
        save_config(config, resolved)
        words = ["train", "--config", str(resolved), "--resume", args.resume, "--run-dir", str(folder)]
        words += ["--profile"] if args.profile else []
        before = _finish_mark(folder)
        status = run_ranks(words, nproc, lock)
        # A signal that came when all was done has stopped nothing.
        return 0 if status > 128 and _finish_mark(folder) not in (None, before) else status


def _finish_mark(folder: Path) -> int | None:
    """Changes when a run ends."""
    from convneur.records.folder import SUMMARY_FILE

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
    if not _is_rank(args):
        args.nproc = rank_count(args.nproc or then["hardware"]["world_size"])
        set_thread_count(args.nproc)
    now = record(config, int(os.environ["WORLD_SIZE"]) if _is_rank(args) else args.nproc)
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
    from convneur.system.determinism import set_determinism

    set_determinism(config.run.determinism)
    with _joined_world() as world:
        from convneur.run.beginning import agreed_start
        from convneur.train import train

        with _agreed_folder(config, args, world) as folder:
            resume = agreed_start(folder, args.begin, world) if args.begin else args.resume
            summary = train(config, world, folder, resume, args.profile)
        if world.is_main and summary:
            _conclude(summary, folder)
    return 0


@contextmanager
def _agreed_folder(config: "Config", args: argparse.Namespace, world: "World") -> Iterator[Path]:
    """The run's folder: what the launcher has chosen, else what rank 0 chooses now."""
    if args.run_dir:
        _keep_lock(args.run_dir)
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
    _conclude(summary, folder)
    return True


def _finished(config: "Config") -> "Summary | None":
    """How this very run has ended, if it has."""
    from convneur.config import saved_config
    from convneur.records.folder import CONFIG_FILE
    from convneur.records.summary import read_summary

    folder = Path(config.run.root) / config.run.name
    summary = read_summary(folder)
    return summary if summary and saved_config(folder / CONFIG_FILE) == config else None


def _conclude(summary: "Summary", folder: Path) -> None:
    averaged = f" ({summary.top1_ema:.2%} with averaged weights)" if summary.top1_ema is not None else ""
    print(f"accuracy    {summary.top1:.2%} top-1 on the held-out images{averaged}")
    print(f"checkpoint  {summary.checkpoint}")
    print(f"next        convneur eval {folder}")


def _check_beginnings(configs: "Sequence[Config]", begin: str) -> None:
    """Raises InputError where runs can't begin as asked, or have begun otherwise."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.run.beginning import check_beginning

    for config in configs:
        check_beginning(Path(config.run.root) / config.run.name, begin)


def submit(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur submit`: a job, or an array of one job a seed, from a snapshot of code and configuration."""
    from dataclasses import replace

    from submitit.slurm.slurm import _make_sbatch_string

    from convneur.config import load_config
    from convneur.launch.submit import executor, submission_folder, submit

    resources = asked_resources(args)
    config = load_config(args.config, overrides)
    configs = [config]
    if args.array:
        runs = [replace(config.run, name=f"{config.run.name}-seed{seed}", seed=seed) for seed in range(args.array)]
        configs = [replace(config, run=run) for run in runs]
    check_start(config, resources.ranks)
    if args.resume:
        _check_beginnings(configs, args.resume)
    folder = submission_folder(Path(config.run.root), config.run.name)
    if args.dry_run:
        made = executor(folder / "jobs", config.run.name, resources, sys.executable)
        count = len(configs) if args.array else None
        print(_make_sbatch_string(made._submitit_command_str, made.folder, map_count=count, **made.parameters), end="")
        return 0
    for job, one in zip(submit(configs, folder, config.run.name, resources, args.resume), configs, strict=True):
        print(f"job {job.job_id}: {Path(one.run.root) / one.run.name}, log {job.paths.stdout}")
    return 0


def asked_resources(args: argparse.Namespace, at_once: int | None = None) -> "Resources":
    """What the flags ask for that `convneur submit` shares with others."""
    from convneur.launch.submit import Resources

    tasks = args.tasks_per_node or max(1, args.gpus_per_node)
    for option in args.sbatch:
        if not re.fullmatch(r"[A-Za-z][\w-]*(=[^\n\r]*)?", option):
            raise InputError(f"--sbatch is {option!r}, expected OPTION=VALUE of sbatch, without --, on one line")
    options = dict(option.partition("=")[::2] for option in args.sbatch)
    return Resources(args.nodes, args.gpus_per_node, tasks, args.cpus_per_task, args.timeout_min, options, at_once)


def runs(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur runs`: a table of the runs in a folder; again and again with --watch."""
    from convneur.launch.runs import Runs, watch

    runs = Runs(args.folder)
    if args.watch:
        watch(runs, args.every)
    runs.show()
    return 0


def evaluate(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur eval`: scores a checkpoint on any number of ranks."""
    if not _is_rank(args):
        from convneur.launch.local import rank_count, run_ranks

        words = ["eval", str(args.path), "--ema" if args.ema else "--raw"]
        words += ["--data", args.data] if args.data else []
        words += ["--split", args.split] if args.split else []
        words += ["--class-map", str(args.class_map)] if args.class_map else []
        words += ["--image-size", str(args.image_size)] if args.image_size is not None else []
        words += ["--crop", str(args.crop)] if args.crop is not None else []
        words += ["--json"] if args.json else []
        return run_ranks(words, rank_count(args.nproc))

    with _joined_world() as world:
        from convneur.records.strict_json import json_text
        from convneur.tools.evaluate import evaluate_checkpoint

        scores = evaluate_checkpoint(
            args.path,
            world,
            data_root=args.data,
            split=args.split,
            averaged=args.ema,
            image_size=args.image_size,
            crop=args.crop,
            class_map=args.class_map,
        )
        if world.is_main and args.json:
            print(json_text(asdict(scores)))
        elif world.is_main:
            print(
                f"top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f} on {scores.images:,} images"
            )
            if scores.among:
                print(
                    f"top-1 {scores.top1_among:.2%}, top-5 {scores.top5_among:.2%} choosing among the {scores.among:,} "
                    "classes that there are images of"
                )
            for line in scores.warnings:
                print(f"warning: {line}")
    return 0


def export(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur export`: writes a checkpoint as a file for others, once it has given the same logits."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.tools.export import export_checkpoint

    written = export_checkpoint(args.path, args.format, args.out, averaged=args.ema)
    takes = "" if args.format == "safetensors" else f"; takes any batch{' and image size' * written.any_size}"
    print(f"{written.path}: logits within {written.difference:.1e} of the checkpoint's{takes}")
    return 0


def explain(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur explain`: draws what the gates of a model do to an image, and prints their statistics."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.launch.tables import show_table
    from convneur.tools.explain import draw, explain

    explanation = explain(args.path, args.image, averaged=args.ema)
    draw(explanation, args.output)
    headings = ("stage", "gate A", "below 1/4", "above 3/4", "over the image", "surprise, first to last chunk")
    rows = []
    for number, stage in enumerate(explanation.stages, 1):
        gate, surprise = stage.gate, stage.surprise
        rows.append(
            (
                str(number),
                f"{gate.mean():.3f} ± {gate.std():.3f}",
                f"{(gate < 0.25).float().mean():.0%}",
                f"{(gate > 0.75).float().mean():.0%}",
                f"{stage.map.min():.3f} to {stage.map.max():.3f}",
                "-" if surprise is None else f"{surprise[0]:.3g} to {surprise[-1]:.3g}",
            )
        )
    show_table(headings, rows)
    print(f"over the image: smallest and largest mean over the channels\npicture         {args.output}")
    return 0


def plot(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur plot`: draws the curves of runs, finished or not."""
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.records.curves import plot_runs
    from convneur.records.folder import CURVE_FILE

    path = args.output or (args.runs[0] / CURVE_FILE if len(args.runs) == 1 else Path("curves.png"))
    for fault in plot_runs(args.runs, path):
        print(f"warning: {fault}", file=sys.stderr)
    print(f"picture  {path}")
    return 0


def ablate(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur ablate`: trains the rows of the ablation table that are missing, and prints and saves the table."""
    outlast_output()
    from convneur.config import save_config
    from convneur.limits import check_values
    from convneur.settings import load_as
    from convneur.studies.ablation import AblationConfig, run_configs, train_rows
    from convneur.studies.series import series_folder, standing

    config = load_as(AblationConfig, args.config, overrides)
    check_values(config)
    if args.dry_run:
        import torch

        _print_ablation(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"), costs_only=True)
        return 0
    if _is_rank(args):
        with _joined_world() as world:
            _keep_lock(series_folder(config))
            train_rows(config, world)
            if world.is_main:
                _print_ablation(config, world.device)
        return 0

    from convneur.launch.folder import run_folder
    from convneur.launch.local import rank_count, run_ranks
    from convneur.launch.signals import stoppable

    nproc = rank_count(args.nproc)
    check(next(iter(run_configs(config).values())), nproc)  # the others differ in the model and the seed alone
    for line in standing(run_configs(config), "ablation").damaged_lines():
        print(line, flush=True)
    with (
        stoppable(),
        run_folder(config.run, resume="auto") as (_, lock),
        TemporaryDirectory(prefix="convneur-config-") as temporary,
    ):
        resolved = Path(temporary) / "config.yaml"
        save_config(config, resolved)
        return run_ranks(["ablate", "--config", str(resolved)], nproc, lock)


def _print_ablation(config: "AblationConfig", device: "torch.device", costs_only: bool = False) -> None:
    from convneur.launch.tables import show_table
    from convneur.studies.ablation import COSTS, HEADINGS, caption, cells, save_table, tabulate
    from convneur.studies.series import series_folder

    results = tabulate(config, device)
    note = caption(config, results, device)
    headings = COSTS if costs_only else HEADINGS
    show_table(headings, [cells(result)[: len(headings)] for result in results], text=("row",))
    print(note)
    if not costs_only:
        print("table      ", *save_table(series_folder(config), results, note))


def info(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur info`: what a model consists of and costs."""
    from convneur.config import load_config
    from convneur.models.describe import describe

    for word in overrides:
        if word.startswith("--") and not word.startswith("--model."):
            raise InputError(f"{word} has no bearing on a model's size; `convneur info` takes --model.KEY VALUE")
    config = load_config(overrides=["--model.variant", args.variant, *overrides])
    model = describe(config.model, args.image_size)
    if args.json:
        print(json.dumps(asdict(model)))
        return 0

    from convneur.launch.tables import show_table

    def cell(value: object) -> str:
        return "-" if value is None else str(value)

    print(
        f"ConvNeur-{model.variant.upper()}: {model.params / 1e6:.3f} M parameters, {model.gmacs:.3f} GMACs"
        f" at {model.image_size} x {model.image_size}\n"
    )
    rows = []
    for number, stage in enumerate(model.stages, 1):
        height, width = stage.resolution
        counts = (stage.width, stage.blocks, stage.branches, stage.memory_width, stage.chunk_length, stage.chunks)
        row = (str(number), f"{height}x{width}", *map(cell, counts), f"{stage.params / 1e6:.3f}M", f"{stage.gmacs:.3f}")
        rows.append(row)
    show_table(("stage", "size", "width", "blocks", "global", "d", "L", "chunks", "params", "GMACs"), rows)
    print("global: blocks with a global branch, d channels in its bottleneck, L tokens in a chunk of its memory")
    print("GMACs: multiply-accumulates of matrix products and convolutions, one image; totals include stem and head")
    return 0


def doctor(args: argparse.Namespace, _: Overrides) -> int:
    """`convneur doctor`: what this machine has; status 1 where something required doesn't work."""
    from convneur.system.doctor import examine, is_healthy

    findings = examine()
    healthy = is_healthy(findings)
    if args.json:
        print(json.dumps({"ok": healthy, "components": [asdict(finding) for finding in findings]}))
        return 0 if healthy else 1

    from convneur.launch.tables import show_table

    headings = ("component", "status", "version", "what is wrong, and what it costs")
    show_table(
        headings,
        [(finding.name, finding.status, finding.version or "-", finding.note) for finding in findings],
        text=headings,
        styles=["red" if finding.required and finding.status != "ok" else None for finding in findings],
        sections=[n for n, (one, two) in enumerate(pairwise(findings)) if one.group != two.group],
    )
    print("all that is required works" if healthy else "something that is required doesn't work")
    return 0 if healthy else 1


def _is_rank(args: argparse.Namespace) -> bool:
    """Whether this process is one of several that a launcher has started.

    Raises InputError where it should be, or might be, and the environment doesn't say which one.
    """
    if args.launch == "local" or (args.launch == "auto" and "RANK" not in os.environ):
        os.environ.pop("RANK", None)  # left over
        return False
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing and args.launch == "env":
        raise InputError(f"--launch env needs {', '.join(missing)} in the environment; torchrun sets them")
    if missing:
        raise InputError(
            f"RANK is set in the environment, as for one of several processes, but not {', '.join(missing)}: unset it,"
            " or pass --launch local"
        )
    for name in RANK_VARIABLES:
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            raise InputError(f"{name} in the environment is {os.environ[name]!r}, expected a number; torchrun sets it")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {size} in the environment, expected RANK below WORLD_SIZE")
    return True


def _keep_lock(folder: Path) -> None:
    """Has this rank, if it is a launcher's, keep the launcher's lock alive for as long as it writes."""
    from convneur.launch import leash
    from convneur.launch.lock import held_lock

    leash.keep(held_lock(folder))


@contextmanager
def _joined_world() -> Iterator["World"]:
    """This process among the ranks. Left in good order only: after a failure the others may never say goodbye."""
    from convneur.system.world import World

    world = World.join()
    yield world
    world.leave()


def check_start(config: "Config", world_size: int) -> None:
    """Refuses, where no run is to start yet, all that its start will: what `check` does, and the initial weights."""
    check(config, world_size)
    from convneur.models.convneur.overflow import check_memories
    from convneur.ops import native
    from convneur.run.trainer import initial_model

    with native.unused():
        check_memories(initial_model(config), config.data.image_size)


def check(config: "Config", world_size: int) -> None:
    """Holds a configuration against the data, the ranks and DeepSpeed, before anything is allocated or written."""
    from convneur.data.check import check_data
    from convneur.engine.optimizer import checked_steps
    from convneur.engine.section import deepspeed_config, parse_with_deepspeed
    from convneur.limits import check_config
    from convneur.system.world import name_accelerator

    name_accelerator()
    check_config(config, world_size)
    steps_per_epoch = check_data(
        config.data,
        num_classes=config.model.num_classes,
        world_size=world_size,
        accumulation=config.train.accumulation,
    )
    checked_steps(config.schedule, steps_per_epoch)
    parse_with_deepspeed(deepspeed_config(config, world_size))
