"""`convneur ablate`: the rows of the paper's ablation table, trained by one recipe."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from convneur.launch.flags import add_config, add_launch
from convneur.launch.parser import Overrides, Parsers, add_command
from convneur.launch.preflight import check
from convneur.launch.rank import is_rank, joined_world, keep_lock
from convneur.launch.signals import stoppable
from convneur.launch.streams import outlast_output
from convneur.records.folder import CONFIG_FILE

if TYPE_CHECKING:
    import torch

    from convneur.studies.ablation import AblationConfig


def add(parsers: Parsers) -> None:
    """Adds the command."""
    ablate = add_command(
        parsers,
        "ablate",
        run,
        "Train every row of the paper's ablation table by one recipe; takes --section.key VALUE.",
        takes_overrides=True,
    )
    add_config(ablate)
    ablate.add_argument(
        "--dry-run", action="store_true", help="print parameters, operations and latency; train nothing"
    )
    add_launch(ablate)


def run(args: argparse.Namespace, overrides: Overrides) -> int:
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

        _print_table(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"), costs_only=True)
        return 0
    if is_rank(args):
        with joined_world() as world:
            keep_lock(series_folder(config))
            train_rows(config, world)
            if world.is_main:
                _print_table(config, world.device)
        return 0

    from convneur.launch.folder import run_folder
    from convneur.launch.local import rank_count, run_ranks

    nproc = rank_count(args.nproc)
    check(next(iter(run_configs(config).values())), nproc)  # the others differ in the model and the seed alone
    for line in standing(run_configs(config), "ablation").damaged_lines():
        print(line, flush=True)
    with (
        stoppable(),
        run_folder(config.run, resume="auto") as (_, lock),
        TemporaryDirectory(prefix="convneur-config-") as temporary,
    ):
        resolved = Path(temporary) / CONFIG_FILE
        save_config(config, resolved)
        return run_ranks(["ablate", "--config", str(resolved)], nproc, lock)


def _print_table(config: "AblationConfig", device: "torch.device", costs_only: bool = False) -> None:
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
