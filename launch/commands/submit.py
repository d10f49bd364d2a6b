"""`convneur submit`: a training run to Slurm, from a snapshot of code and configuration."""

import argparse
from dataclasses import replace
from pathlib import Path

from convneur.launch.flags import add_config, add_resources, asked_resources
from convneur.launch.parser import TASKS, Overrides, Parsers, add_command
from convneur.launch.preflight import check_beginnings, check_start


def add(parsers: Parsers) -> None:
    """Adds the command."""
    submit = add_command(
        parsers,
        "submit",
        run,
        "Submit a training run to Slurm, from a snapshot of code and configuration; takes --section.key VALUE.",
        takes_overrides=True,
    )
    add_config(submit)
    add_resources(submit)
    submit.add_argument(
        "--resume", metavar="PATH", help="begin the run from a checkpoint, or from another run's newest"
    )
    submit.add_argument("--array", type=TASKS, metavar="N", help="an array of N runs, with seeds 0 to N-1")
    submit.add_argument("--dry-run", action="store_true", help="print the text for sbatch; write and submit nothing")


def run(args: argparse.Namespace, overrides: Overrides) -> int:
    """`convneur submit`: a job, or an array of one job a seed, from a snapshot of code and configuration."""
    from convneur.config import load_config
    from convneur.launch.submit import sbatch_text, submission_folder, submit

    resources = asked_resources(args)
    config = load_config(args.config, overrides)
    configs = [config]
    if args.array:
        runs = [replace(config.run, name=f"{config.run.name}-seed{seed}", seed=seed) for seed in range(args.array)]
        configs = [replace(config, run=run) for run in runs]
    check_start(config, resources.ranks)
    if args.resume:
        check_beginnings(configs, args.resume)
    folder = submission_folder(Path(config.run.root), config.run.name)
    if args.dry_run:
        print(sbatch_text(folder, config.run.name, resources, len(configs) if args.array else None), end="")
        return 0
    for job, one in zip(submit(configs, folder, config.run.name, resources, args.resume), configs, strict=True):
        print(f"job {job.job_id}: {Path(one.run.root) / one.run.name}, log {job.paths.stdout}")
    return 0
