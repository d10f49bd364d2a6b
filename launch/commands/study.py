"""`convneur study`: models over a range of sizes, trained by one recipe, and scaling laws fitted to them."""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from convneur.data.errors import InputError
from convneur.launch.commands.plan import words
from convneur.launch.flags import add_gpu, add_part, add_resources, asked_cluster, asked_part, asked_resources
from convneur.launch.parser import PROCESSES, Command, Overrides, Parser, Parsers, add_command, add_group
from convneur.launch.preflight import check, check_start
from convneur.launch.signals import StoppedError

if TYPE_CHECKING:
    from convneur.config import Config
    from convneur.studies.grid import Place, Point, StudyConfig
    from convneur.studies.series import Standing


def add(parsers: Parsers) -> None:
    """Adds the command, with its actions."""
    actions = add_group(
        parsers,
        "study",
        "Train models over a range of sizes by one recipe, and fit scaling laws to them.",
        dest="action",
    )
    _add_run(actions)
    command = _add(actions, "missing", missing, "Write the configurations of the unfinished runs, and name them")
    add_part(command, "the Ith of N parts only, as a job of an array")
    _add(actions, "status", status, "Show how far a study is")
    _add(actions, "fit", fit, "Fit scaling laws to the finished runs of a study")
    command = _add(actions, "report", report, "Write the report of a study, as far as it has come")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: the study's)")


def _add(actions: Parsers, name: str, run: Command, summary: str) -> Parser:
    action = add_command(actions, name, run, f"{summary}; takes --section.key VALUE.", takes_overrides=True)
    action.add_argument("config", type=Path, metavar="FILE", help="YAML file with the recipe and the study's axes")
    return action


def _add_run(actions: Parsers) -> None:
    command = _add(actions, "run", run, "Train the runs of a study that aren't finished")
    command.add_argument(
        "--jobs",
        type=PROCESSES,
        metavar="N",
        help="runs at a time (default: 1; with --launch slurm, as many as Slurm starts)",
    )
    command.add_argument(
        "--nproc", type=PROCESSES, metavar="N", help="processes a run here (default: one a GPU, or one)"
    )
    command.add_argument(
        "--launch",
        choices=["local", "slurm", "print"],
        default="local",
        help="local: train on this machine (default); slurm: submit an array of jobs, one a run, from a snapshot of"
        " code and configurations; print: only print a line for each run that submits it to Slurm",
    )
    command.add_argument(
        "--script",
        type=Path,
        default=Path("slurm/train_m4.sh"),
        metavar="FILE",
        help="with --launch print, the batch script whose resources the jobs get (default: slurm/train_m4.sh)",
    )
    command.add_argument("--plan", action="store_true", help="predict what the study costs, and train nothing")
    add_gpu(command)
    add_resources(command.add_argument_group("what a job gets, with --launch slurm, or is planned for"))


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study run`: trains what is missing, here or by Slurm, or prints how; jobs check the data then."""
    config = _load(args, overrides)
    from convneur.launch.folder import run_folder as locked_folder
    from convneur.launch.local import rank_count
    from convneur.launch.side_by_side import run_missing, save_configs, sbatch_lines
    from convneur.studies.grid import study_runs
    from convneur.studies.series import series_folder, standing

    runs, folder = study_runs(config), series_folder(config)
    if args.plan:
        return _plan(args, config, runs, folder)
    stand = standing(runs, "study")
    _warn(stand)
    if args.launch == "print":
        print(*sbatch_lines(stand.missing, save_configs(stand.missing, folder), args.script), sep="\n")
        return 0
    if args.launch == "slurm":
        with locked_folder(config.run, resume="auto"):
            return _submit(args, stand, folder)
    nproc = rank_count(args.nproc)
    for one in {(one.data, one.schedule): one for one in runs.values()}.values():
        check(one, nproc)  # the others differ in model, learning rate and seed alone
    with locked_folder(config.run, resume="auto"):
        try:
            failed = run_missing(config, stand, folder, args.jobs or 1, nproc)
        except StoppedError as stopped:
            print(f"{stopped}; the same command goes on")
            return stopped.status
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")
    if stand.damaged:
        print(f"{len(stand.damaged)} of {len(runs)} runs are damaged: see above")
    print(f"next        convneur study report {args.config}")
    return 1 if failed or stand.damaged else 0


def _plan(args: argparse.Namespace, config: "StudyConfig", runs: "Mapping[Place, Config]", folder: Path) -> int:
    """Prints what the study will cost, and keeps it for the report; trains nothing."""
    from convneur.data.prepare.progress import progress
    from convneur.launch.tables import show_table
    from convneur.planning.forecast import total
    from convneur.studies.cost import plan_study, said_once, save_study_plan

    machines = asked_cluster(args)
    with progress("planning", len(runs), "runs") as advance:
        plans = plan_study(runs, machines, advance)
    rows = []
    for size in [*config.study.sizes, *config.study.held_out]:
        for placement in config.study.placements:
            mine = [plan for place, plan in plans.items() if (place.size, place.placement) == (size, placement)]
            held = max(plan.memory[plan.stage].total for plan in mine) / 1e9
            hours = total([plan.gpu_hours for plan in mine])
            speed = words(mine[0].images_per_second, "")
            rows.append((size, placement, str(len(mine)), f"{held:.1f}", speed, words(hours, "")))
    show_table(("size", "placement", "runs", "GB a GPU", "images/s", "GPU hours"), rows, text=("size", "placement"))
    everything = total([plan.gpu_hours for plan in plans.values()])
    print(f"{len(plans)} runs on {machines.ranks} x {machines.gpu.name}: {words(everything, 'GPU hours')}")
    for line in said_once(("", line) for plan in plans.values() for line in plan.assumed):
        print(f"assumed: {line}")
    for line in said_once((plan.variant, line) for plan in plans.values() for line in plan.warnings):
        print(f"warning: {line}")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"written     {save_study_plan(plans, folder)}")
    return 0


def _submit(args: argparse.Namespace, stand: "Standing[Place]", folder: Path) -> int:
    """Submits the runs that are neither finished nor in Slurm's hands already."""
    from convneur.launch.slurm_queue import array_limit, queued
    from convneur.launch.submit import submission_folder, submit

    in_queue = queued(folder)
    waiting = [one for one in stand.missing.values() if one.run.name not in in_queue]
    finished, unfinished = len(stand.finished), len(stand.missing)
    total = finished + unfinished + len(stand.damaged)
    print(f"{finished} of {total} runs are finished, {unfinished - len(waiting)} are in the queue already")
    if not waiting:
        return 0
    resources = asked_resources(args, args.jobs or len(waiting))
    for one in {(one.data, one.schedule, one.model): one for one in waiting}.values():
        check_start(one, resources.ranks)  # the others differ in learning rate and seed alone
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
    part = asked_part(args)
    config = _load(args, overrides)
    from convneur.launch.side_by_side import save_configs
    from convneur.studies.grid import study_runs
    from convneur.studies.series import series_folder, standing

    runs = list(study_runs(config).items())
    stand = standing(dict(runs[part.number - 1 :: part.of] if part else runs), "study")
    _warn(stand)
    print(*(path.absolute() for path in save_configs(stand.missing, series_folder(config)).values()), sep="\n")
    return 0


def status(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study status`: how far every part of the study is."""
    config = _load(args, overrides)
    from convneur.launch.slurm_queue import queued
    from convneur.launch.tables import show_table
    from convneur.studies.grid import progress
    from convneur.studies.series import series_folder

    states = progress(config)
    in_queue: dict[str, str] = {}
    unknown = ""
    if shutil.which("squeue"):
        try:
            in_queue = queued(series_folder(config))
        except InputError as error:  # the rest is known
            unknown = str(error)
    headings = ("size", "placement", "runs", "finished", "begun", "damaged", "in Slurm", "of the operations")
    rows = []
    for size in [*config.study.sizes, *config.study.held_out]:
        for placement in config.study.placements:
            mine = [state for place, state in states.items() if (place.size, place.placement) == (size, placement)]
            finished = sum(state.finished for state in mine)
            held = sum(place.name in in_queue for place in states if (place.size, place.placement) == (size, placement))
            begun = sum(not state.finished and state.done > 0 for state in mine)
            damaged = sum(state.damaged is not None for state in mine)
            share = sum(state.done * state.weight for state in mine) / sum(state.weight for state in mine)
            counts = map(str, (len(mine), finished, begun, damaged, "?" if unknown else held))
            rows.append((size, placement, *counts, f"{share:.0%}"))
    show_table(headings, rows, text=("size", "placement"))
    for state in states.values():
        if state.damaged:
            print(f"damaged: {state.damaged}")
    if unknown:
        print(f"note: {unknown}")
    done = sum(state.done * state.weight for state in states.values()) / sum(s.weight for s in states.values())
    finished = sum(state.finished for state in states.values())
    print(f"{finished} of {len(states)} runs are finished, {done:.0%} of the operations made")
    return 0


def fit(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study fit`: fits laws to the runs that are finished, prints them and writes fit.json."""
    config = _load(args, overrides)
    from convneur.studies.fit import find, save_findings
    from convneur.studies.grid import finished_points
    from convneur.studies.series import series_folder
    from convneur.studies.words import fit_lines

    damaged: list[str] = []
    findings = find(config, _some(finished_points(config, damaged), config, damaged), damaged)
    print(*fit_lines(findings), sep="\n")
    print(f"written     {save_findings(findings, series_folder(config))}")
    return 0


def report(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study report`: writes report.html, its figures and points.csv."""
    config = _load(args, overrides)
    from convneur.studies.fit import find, save_findings
    from convneur.studies.grid import finished_points
    from convneur.studies.report import write_report
    from convneur.studies.series import series_folder

    damaged: list[str] = []
    findings = find(config, _some(finished_points(config, damaged), config, damaged), damaged)
    folder = args.out or series_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_findings(findings, folder)
    print("report     ", *write_report(config, findings, folder))
    return 0


def _load(args: argparse.Namespace, overrides: Overrides) -> "StudyConfig":
    from convneur.system.world import name_accelerator

    name_accelerator()
    from convneur.limits import check_values
    from convneur.settings import load_as
    from convneur.studies.grid import StudyConfig, study_runs

    config = load_as(StudyConfig, [args.config], overrides)
    for one in study_runs(config).values():
        check_values(one)
    return config


def _some(points: "list[Point]", config: "StudyConfig", damaged: list[str]) -> "list[Point]":
    if not points:
        folder = Path(config.run.root) / config.run.name
        others = f", but {len(damaged)} damaged, such as this: {damaged[0]}" if damaged else ""
        raise InputError(f"{folder} has no finished run of this study yet{others}; `convneur study run` trains them")
    return points


def _warn(standing: "Standing[Place]") -> None:
    """On standard error: standard output may be for a program."""
    print(*standing.damaged_lines(), sep="\n", end="\n" * bool(standing.damaged), file=sys.stderr, flush=True)
