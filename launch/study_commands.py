"""The subcommands of `convneur study`, each from parsed arguments to an exit status.

They import what they need when they run, as those in `convneur.launch.commands` do.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convneur.data.errors import InputError

if TYPE_CHECKING:
    from convneur.study import Point, StudyConfig

Overrides = Sequence[str]


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study run`: trains what is missing, or prints how Slurm would; its jobs check the data then."""
    config = _load(args, overrides)
    from convneur.launch.commands import check
    from convneur.launch.folder import run_folder as locked_folder
    from convneur.launch.local import rank_count
    from convneur.launch.study import StoppedError, run_missing, save_configs, sbatch_lines
    from convneur.series import check_saved_runs, run_folder, series_folder
    from convneur.study import study_runs
    from convneur.summary import read_summary

    if args.jobs < 1:
        raise InputError(f"--jobs is {args.jobs}, expected at least 1")
    runs, folder = study_runs(config), series_folder(config)
    check_saved_runs(runs.values(), "study")
    if args.launch == "print":
        missing = {place: one for place, one in runs.items() if not read_summary(run_folder(one))}
        print(*sbatch_lines(missing, save_configs(missing, folder), args.script), sep="\n")
        return 0
    nproc = rank_count(args.nproc)
    for one in {(one.data, one.schedule): one for one in runs.values()}.values():
        check(one, nproc)  # the others differ in model, learning rate and seed alone
    with locked_folder(config.run, resume="auto"):
        try:
            failed = run_missing(config, runs, folder, args.jobs, nproc)
        except StoppedError as stopped:
            print(f"stopped by {stopped}; the same command goes on")
            return 130
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again")
    print(f"next        convneur study report {args.config}")
    return 1 if failed else 0


def status(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur study status`: how far every part of the study is."""
    config = _load(args, overrides)
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from convneur.study import progress

    states = progress(config)
    table = Table(box=SIMPLE_HEAD, padding=0)
    for heading in ("size", "placement", "runs", "finished", "begun", "of the operations"):
        table.add_column(heading, justify="left" if heading in ("size", "placement") else "right")
    for size in [*config.study.sizes, *config.study.held_out]:
        for placement in config.study.placements:
            mine = [state for place, state in states.items() if (place.size, place.placement) == (size, placement)]
            finished = sum(state.finished for state in mine)
            begun = sum(not state.finished and state.done > 0 for state in mine)
            share = sum(state.done * state.weight for state in mine) / sum(state.weight for state in mine)
            table.add_row(size, placement, str(len(mine)), str(finished), str(begun), f"{share:.0%}")
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
