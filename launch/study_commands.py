"""The subcommands of `convneur study`, each from parsed arguments to an exit status.

They import what they need when they run, as those in `convneur.launch.commands` do.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convneur.data.errors import InputError

if TYPE_CHECKING:
    from convneur.config import Config
    from convneur.study import Place, Point, StudyConfig

Overrides = Sequence[str]


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study run`: trains what is missing, here or by Slurm, or prints how; jobs check the data then."""
    config = _load(args, overrides)
    from convneur.launch.commands import check
    from convneur.launch.folder import run_folder as locked_folder
    from convneur.launch.local import rank_count
    from convneur.launch.study import StoppedError, run_missing, save_configs, sbatch_lines
    from convneur.series import check_saved_runs, run_folder, series_folder
    from convneur.study import study_runs
    from convneur.summary import read_summary

    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"--jobs is {args.jobs}, expected at least 1")
    runs, folder = study_runs(config), series_folder(config)
    check_saved_runs(runs.values(), "study")
    if args.plan:
        return _plan(args, config, runs, folder)
    if args.launch == "print":
        missing = {place: one for place, one in runs.items() if not read_summary(run_folder(one))}
        print(*sbatch_lines(missing, save_configs(missing, folder), args.script), sep="\n")
        return 0
    if args.launch == "slurm":
        with locked_folder(config.run, resume="auto"):
            return _submit(args, runs, folder)
    nproc = rank_count(args.nproc)
    for one in {(one.data, one.schedule): one for one in runs.values()}.values():
        check(one, nproc)  # the others differ in model, learning rate and seed alone
    with locked_folder(config.run, resume="auto"):
        try:
            failed = run_missing(config, runs, folder, args.jobs or 1, nproc)
        except StoppedError as stopped:
            print(f"stopped by {stopped}; the same command goes on")
            return 130
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")
    print(f"next        convneur study report {args.config}")
    return 1 if failed else 0


def _plan(args: argparse.Namespace, config: "StudyConfig", runs: "Mapping[Place, Config]", folder: Path) -> int:
    """Prints what the study will cost, and keeps it for the report; trains nothing."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from convneur.data.progress import progress
    from convneur.launch.plan_commands import cluster, words
    from convneur.study_plan import plan_study, save_study_plan, total

    machines = cluster(args)
    with progress("planning", len(runs), "runs") as advance:
        plans = plan_study(runs, machines, advance)
    table = Table(box=SIMPLE_HEAD, padding=0)
    for heading in ("size", "placement", "runs", "GB a GPU", "images/s", "GPU hours"):
        table.add_column(heading, justify="left" if heading in ("size", "placement") else "right")
    for size in [*config.study.sizes, *config.study.held_out]:
        for placement in config.study.placements:
            mine = [plan for place, plan in plans.items() if (place.size, place.placement) == (size, placement)]
            held = max(plan.memory[plan.stage].total for plan in mine) / 1e9
            hours = total([plan.gpu_hours for plan in mine])
            speed = words(mine[0].images_per_second, "")
            table.add_row(size, placement, str(len(mine)), f"{held:.1f}", speed, words(hours, ""))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    everything = total([plan.gpu_hours for plan in plans.values()])
    console.print(f"{len(plans)} runs on {machines.ranks} x {machines.gpu.name}: {words(everything, 'GPU hours')}")
    for line in dict.fromkeys(line for plan in plans.values() for line in plan.assumed):
        console.print(f"assumed: {line}")
    worst = {(plan.variant, line.split()[0]): line for plan in plans.values() for line in plan.warnings}
    for (variant, _), line in worst.items():
        console.print(f"warning: {variant}: {line}")
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"written     {save_study_plan(plans, folder)}")
    return 0


def _submit(args: argparse.Namespace, runs: "Mapping[Place, Config]", folder: Path) -> int:
    """Submits the runs that are neither finished nor in Slurm's hands already."""
    from convneur.launch.commands import asked_resources, check
    from convneur.launch.submit import array_limit, queued, submission_folder, submit
    from convneur.series import run_folder
    from convneur.summary import read_summary

    in_queue = queued(folder)
    unfinished = [one for one in runs.values() if not read_summary(run_folder(one))]
    waiting = [one for one in unfinished if one.run.name not in in_queue]
    finished = len(runs) - len(unfinished)
    print(f"{finished} of {len(runs)} runs are finished, {len(unfinished) - len(waiting)} are in the queue already")
    if not waiting:
        return 0
    resources = asked_resources(args, args.jobs or len(waiting))
    for one in {(one.data, one.schedule): one for one in waiting}.values():
        check(one, resources.ranks)
    now = waiting[: array_limit()]
    submission = submission_folder(folder, folder.name)
    for job, one in zip(submit(now, submission, folder.name, resources), now, strict=True):
        print(f"job {job.job_id}: {one.run.name}, log {job.paths.stdout}")
    if len(now) < len(waiting):
        print(f"{len(waiting) - len(now)} more are too many for one array here; the same command submits them later")
    print(f"next        convneur study status {args.config}")
    return 0


def missing(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study missing`: what slurm/study.sh trains."""
    from convneur.launch.data_commands import part_of

    part = part_of(args.part)
    config = _load(args, overrides)
    from convneur.launch.study import save_configs
    from convneur.series import check_saved_runs, run_folder, series_folder
    from convneur.study import study_runs
    from convneur.summary import read_summary

    runs = list(study_runs(config).items())
    mine = dict(runs[part.number - 1 :: part.of] if part else runs)
    check_saved_runs(mine.values(), "study")
    unfinished = {place: one for place, one in mine.items() if not read_summary(run_folder(one))}
    print(*(path.absolute() for path in save_configs(unfinished, series_folder(config)).values()), sep="\n")
    return 0


def status(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study status`: how far every part of the study is."""
    config = _load(args, overrides)
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from convneur.launch.submit import queued
    from convneur.series import series_folder
    from convneur.study import progress

    states = progress(config)
    in_queue = queued(series_folder(config)) if shutil.which("squeue") else {}
    table = Table(box=SIMPLE_HEAD, padding=0)
    for heading in ("size", "placement", "runs", "finished", "begun", "in Slurm", "of the operations"):
        table.add_column(heading, justify="left" if heading in ("size", "placement") else "right")
    for size in [*config.study.sizes, *config.study.held_out]:
        for placement in config.study.placements:
            mine = [state for place, state in states.items() if (place.size, place.placement) == (size, placement)]
            finished = sum(state.finished for state in mine)
            held = sum(place.name in in_queue for place in states if (place.size, place.placement) == (size, placement))
            begun = sum(not state.finished and state.done > 0 for state in mine)
            share = sum(state.done * state.weight for state in mine) / sum(state.weight for state in mine)
            table.add_row(size, placement, str(len(mine)), str(finished), str(begun), str(held), f"{share:.0%}")
    Console().print(table)
    done = sum(state.done * state.weight for state in states.values()) / sum(s.weight for s in states.values())
    finished = sum(state.finished for state in states.values())
    print(f"{finished} of {len(states)} runs are finished, {done:.0%} of the operations made")
    return 0


def fit(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study fit`: fits laws to the runs that are finished, prints them and writes fit.json."""
    config = _load(args, overrides)
    from convneur.report import fit_lines
    from convneur.series import series_folder
    from convneur.study import finished_points
    from convneur.study_fit import find, save_findings

    findings = find(config, _some(finished_points(config), config))
    print(*fit_lines(findings), sep="\n")
    print(f"written     {save_findings(findings, series_folder(config))}")
    return 0


def report(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study report`: writes report.html, its figures and points.csv."""
    config = _load(args, overrides)
    from convneur.report import write_report
    from convneur.series import series_folder
    from convneur.study import finished_points
    from convneur.study_fit import find, save_findings

    findings = find(config, _some(finished_points(config), config))
    folder = args.out or series_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_findings(findings, folder)
    print("report     ", *write_report(config, findings, folder))
    return 0


def _load(args: argparse.Namespace, overrides: Overrides) -> "StudyConfig":
    from convneur.world import name_accelerator

    name_accelerator()
    from convneur.config import load_as
    from convneur.study import StudyConfig

    return load_as(StudyConfig, [args.config], overrides)


def _some(points: "list[Point]", config: "StudyConfig") -> "list[Point]":
    if not points:
        folder = Path(config.run.root) / config.run.name
        raise InputError(f"{folder} has no finished run of this study yet; `convneur study run` trains them")
    return points
