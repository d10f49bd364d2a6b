"""The command line: words to arguments, and errors to one line."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from convneur.data.errors import OUTAGE_STATUS, InputError, StorageError, WorkerError, is_outage
from convneur.data.stores.addresses import redact
from convneur.errors import TrainingError
from convneur.launch.commands import data as data_commands
from convneur.launch.commands import plan as plan_commands
from convneur.launch.commands import study as study_commands
from convneur.launch.commands import train as commands
from convneur.launch.commands.train import Command
from convneur.launch.flags import (
    COUNT,
    PIXELS,
    PROCESSES,
    RANKS,
    TASKS,
    Parser,
    check_words,
    positive,
    printable,
    whole,
)
from convneur.launch.signals import StoppedError
from convneur.launch.streams import close_output, escape_output

DENIED = {errno.EACCES, errno.EPERM}
ENVIRONMENT = DENIED | {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What anything that reads and writes may meet: another user's files, a disk that is full or read-only, a quota."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit status: 2 for bad input, 1 for training that can't go on.

    It is 74 where storage or a server doesn't answer.
    """
    escape_output()
    status = _run(words)
    lost = close_output(quiet=status != 0)
    return status or lost


def _run(words: Sequence[str] | None) -> int:
    try:
        words, overrides = _split_overrides(sys.argv[1:] if words is None else words)
        check_words(words, "convneur")
        args, unknown = _parser().parse_known_args(words)
        if unknown:
            raise _unknown(unknown[0], args)
        if overrides and not args.takes_overrides:
            raise InputError(f"{overrides[0]} is a configuration key, and `convneur {args.command}` takes none")
        command: Command = args.run
        return _call(command, args, overrides)
    except (InputError, TrainingError, WorkerError) as error:
        _say(error)
        return exit_status(error)
    except BrokenPipeError:
        return 1  # nobody reads what is printed any more
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        what = "used" if error.errno in DENIED else "written"
        where = f"{error.filename} can't be {what}: " if error.filename else ""
        _say(TrainingError(f"{where}{error.strerror}"))
        return 1
    except StoppedError as error:
        _say(TrainingError(f"{error} before anything was begun; there was nothing to save"))
        return error.status
    except KeyboardInterrupt:
        return 130


def exit_status(error: Exception) -> int:
    """What a process ends with that can't go on for this reason."""
    return OUTAGE_STATUS if isinstance(error, StorageError) else 2 if isinstance(error, InputError) else 1


def _call(command: Command, args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs a command; what fails because storage doesn't answer, however that shows, is a StorageError."""
    try:
        return command(args, overrides)
    except (InputError, TrainingError, OSError) as error:
        if is_outage(error) and not isinstance(error, StorageError):
            raise StorageError(f"{error}: the storage doesn't answer; see to it, then resume") from error
        raise


def _unknown(word: str, args: argparse.Namespace) -> InputError:
    """Says which flag was probably meant: one of the command, or a configuration key without its section."""
    from convneur.config import Config
    from convneur.settings import config_keys, nearest_key

    if not word.startswith("--"):
        return InputError(f"{word!r} belongs to no flag; see `convneur {args.command} --help`")
    flags = re.findall(r"--([\w-]+)", args.parser.format_usage())
    if args.takes_overrides:
        flags += (key for key in config_keys(Config) if "." in key)  # the sections themselves are no flags
    nearest = nearest_key(word[2:].partition("=")[0], flags)
    hint = f"did you mean --{nearest}?" if nearest else f"see `convneur {args.command} --help`"
    return InputError(f"{word} is not a flag of `convneur {args.command}`; {hint}")


def _say(error: Exception) -> None:
    """Prints an error, or leaves it to the launcher, if there is one, to print that once for all ranks."""
    line = redact(printable(str(error)))
    if "RANK" in os.environ:
        from convneur.launch.local import report_failure

        if report_failure(type(error)(line)):
            return
    with suppress(OSError):
        print(f"convneur: error: {line}", file=sys.stderr)


class _TrainHelp(argparse.Action):
    """Shows the flags of `convneur train`, then every configuration key."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Prints, and exits."""
        from convneur.launch.key_help import key_help

        print(f"{parser.format_help()}\nconfiguration keys, in a file or as flags:\n\n{key_help()}")
        parser.exit()


def _split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sets configuration overrides, which are the flags with a dot, apart from the words that argparse knows."""
    rest, overrides = [], []
    remaining = iter(words)
    for word in remaining:
        flag, equals, _ = word.partition("=")
        if flag != "--deepspeed" and not (flag.startswith("--") and "." in flag):
            rest.append(word)
            continue
        overrides.append(word)
        if not equals:
            overrides.extend(value for value in [next(remaining, None)] if value is not None)
    return rest, overrides


def _parser() -> Parser:
    parser = Parser(
        prog="convneur", description="Distributed training of ConvNeur vision backbones.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, summary: str, takes_overrides: bool = False, **kwargs: Any) -> Parser:
        return _add_command(subparsers, name, run, summary, takes_overrides, **kwargs)

    _add_prepare(subparsers)
    _add_data(subparsers)

    train = add(
        "train",
        commands.train,
        "Train a model; see below for the configuration keys.",
        takes_overrides=True,
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_TrainHelp, help="show this help and exit")
    train.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file; of several, later ones win"
    )
    _add_launch(train)
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
    _add_json(train, "with --check, print the run's folder and whether the run is finished, as JSON")
    # How a batch script, which starts a run again by the same words, says what --resume says to others.
    train.add_argument("--begin", help=argparse.SUPPRESS)
    train.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)  # how a launcher tells its ranks the folder

    submit = add(
        "submit",
        commands.submit,
        "Submit a training run to Slurm, from a snapshot of code and configuration; takes --section.key VALUE.",
        takes_overrides=True,
    )
    submit.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file; of several, later ones win"
    )
    _add_resources(submit)
    submit.add_argument(
        "--resume", metavar="PATH", help="begin the run from a checkpoint, or from another run's newest"
    )
    submit.add_argument("--array", type=TASKS, metavar="N", help="an array of N runs, with seeds 0 to N-1")
    submit.add_argument("--dry-run", action="store_true", help="print the text for sbatch; write and submit nothing")

    runs = add("runs", commands.runs, "List runs: state, epoch, accuracy, speed, time left, restarts, ETTR.")
    runs.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    runs.add_argument("--watch", action="store_true", help="refresh until interrupted")
    runs.add_argument(
        "--every", type=positive(1e6), default=10.0, metavar="SECONDS", help="between refreshes (default: 10)"
    )

    evaluate = add("eval", commands.evaluate, "Measure a checkpoint's accuracy.")
    evaluate.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN", help="folder of a checkpoint, or of a run")
    evaluate.add_argument("--data", metavar="DIR", help="prepared dataset (default: the run's own)")
    evaluate.add_argument("--split", help="split of the dataset (default: the run's own)")
    evaluate.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="lines CLASS_OF_THE_DATASET tab CLASS_OF_THE_MODEL (default: classes are called the same)",
    )
    evaluate.add_argument(
        "--image-size",
        type=PIXELS,
        metavar="PIXELS",
        help="side of the images (default: as in training)",
    )
    evaluate.add_argument(
        "--crop",
        type=positive(1),
        metavar="FRACTION",
        help="part of the resized image's side that is cut out (default: the run's data.eval_crop)",
    )
    _add_weights(evaluate)
    _add_launch(evaluate)
    _add_json(evaluate)

    export = add("export", commands.export, "Write a checkpoint as a file for others, checked to give the same logits.")
    export.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN", help="folder of a checkpoint, or of a run")
    export.add_argument(
        "--format",
        required=True,
        choices=["safetensors", "onnx", "torch"],
        help="safetensors: the weights, as timm's convneur_* models name them; onnx; torch: for torch.export.load",
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: the run's name, here)")
    _add_weights(export)

    explain = add("explain", commands.explain, "Draw what a model's gates and memories do to an image.")
    explain.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN", help="folder of a checkpoint, or of a run")
    explain.add_argument("image", type=Path, metavar="IMAGE", help="image file")
    explain.add_argument(
        "-o", "--output", type=Path, default=Path("gates.png"), metavar="FILE", help="picture (default: gates.png)"
    )
    _add_weights(explain)

    plot = add("plot", commands.plot, "Draw the curves of one run, or of several together.")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    plot.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="picture (default: RUN/curve.png; curves.png for several)"
    )

    ablate = add(
        "ablate",
        commands.ablate,
        "Train every row of the paper's ablation table by one recipe; takes --section.key VALUE.",
        takes_overrides=True,
    )
    ablate.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file; of several, later ones win"
    )
    ablate.add_argument(
        "--dry-run", action="store_true", help="print parameters, operations and latency; train nothing"
    )
    _add_launch(ablate)

    _add_study(subparsers)

    plan = add(
        "plan",
        plan_commands.plan,
        "Predict memory, speed, communication, hours and disk of a run; takes --section.key VALUE.",
        takes_overrides=True,
    )
    plan.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML file; of several, later ones win"
    )
    plan.add_argument("--nodes", type=COUNT, default=1, metavar="N", help="nodes (default: 1)")
    plan.add_argument("--gpus-per-node", type=COUNT, default=8, metavar="N", help="GPUs of a node (default: 8)")
    _add_gpu(plan)
    _add_json(plan)

    info = add(
        "info",
        commands.info,
        "Show a variant's parameters, operations and stages; takes --model.KEY VALUE.",
        takes_overrides=True,
    )
    info.add_argument("variant", help="n1 to n3, m1 to m9, or a shape such as 24x2-2-6-2")
    info.add_argument(
        "--image-size",
        type=PIXELS,
        default=224,
        metavar="PIXELS",
        help="side of the image (default: 224)",
    )
    _add_json(info)

    doctor = add("doctor", commands.doctor, "Show what this machine has, and what each missing part costs.")
    _add_json(doctor)
    return parser


def _add_command(
    among: Any, name: str, run: Command, summary: str, takes_overrides: bool = False, **kwargs: Any
) -> Parser:
    command: Parser = among.add_parser(name, help=summary, description=summary, allow_abbrev=False, **kwargs)
    full_name = command.prog.partition(" ")[2]
    command.set_defaults(run=run, takes_overrides=takes_overrides, parser=command, command=full_name)
    return command


def _add_prepare(subparsers: Any) -> None:
    summary = "Write a dataset as WebDataset shards, or in FFCV's format."
    prepare = subparsers.add_parser("prepare", help=summary, description=summary, allow_abbrev=False)
    datasets = prepare.add_subparsers(dest="dataset", required=True, metavar="DATASET")

    def add(name: str, run: Command, summary: str) -> Parser:
        dataset = _add_command(datasets, name, run, summary)
        dataset.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
        return dataset

    digits = add("digits", data_commands.prepare_digits, "Scanned handwritten digits that ship with scikit-learn.")
    _add_format(digits)

    imagenet = add("imagenet", data_commands.prepare_imagenet, "ImageNet, from its archives or its folders.")
    imagenet.add_argument(
        "--source",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz,"
        " or with train/nXXXXXXXX/*.JPEG and val/nXXXXXXXX/*.JPEG",
    )
    imagenet.add_argument(
        "--max-side",
        type=COUNT,
        metavar="PIXELS",
        help="scale larger images down to this longer side, and encode anew",
    )
    imagenet.add_argument(
        "--part",
        metavar="I/N",
        help="write the Ith of N parts only, as a job of an array; when all are written, run once without",
    )
    _add_format(imagenet)
    _add_processes(imagenet)

    synthetic = add("synthetic", data_commands.prepare_synthetic, "Natural-looking images, for benchmarks.")
    synthetic.add_argument("--classes", type=COUNT, default=1000, metavar="K", help="classes (default: 1000)")
    synthetic.add_argument("--images", type=COUNT, default=10000, metavar="N", help="training images (default: 10000)")
    synthetic.add_argument("--size", default="375x500", metavar="HxW", help="pixels (default: 375x500)")
    _add_format(synthetic)
    _add_processes(synthetic)

    index = add("index", data_commands.prepare_index, "An index for shards that somebody else wrote; they stay there.")
    index.add_argument(
        "shards",
        metavar="URL_OR_GLOB",
        help="WebDataset tars with jpg, jpeg, png or webp and cls: paths, http(s):// or s3://; {000..099}, * and ?",
    )
    index.add_argument("--split", default="train", help="split that they make up (default: train)")
    _add_processes(index)


def _add_data(subparsers: Any) -> None:
    summary = "Check a dataset, or look into it."
    data = subparsers.add_parser("data", help=summary, description=summary, allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = _add_command(
        actions,
        "verify",
        data_commands.verify,
        "Check every byte and decode every image; deny those that can't be read.",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="prepared dataset")
    _add_processes(verify)
    show = _add_command(
        actions,
        "show",
        data_commands.show,
        "Show counts, sizes and class balance, and draw augmented samples; takes configuration keys.",
        takes_overrides=True,
    )
    show.add_argument("folder", type=Path, metavar="DIR", help="prepared dataset")
    show.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file with the augmentation")
    show.add_argument(
        "--sheet", type=Path, default=Path("samples.png"), metavar="FILE", help="picture to draw (default: samples.png)"
    )


def _add_study(subparsers: Any) -> None:
    summary = "Train models over a range of sizes by one recipe, and fit scaling laws to them."
    study = subparsers.add_parser("study", help=summary, description=summary, allow_abbrev=False)
    actions = study.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, run: Command, summary: str) -> Parser:
        action = _add_command(actions, name, run, f"{summary}; takes --section.key VALUE.", takes_overrides=True)
        action.add_argument("config", type=Path, metavar="FILE", help="YAML file with the recipe and the study's axes")
        return action

    run = add("run", study_commands.run, "Train the runs of a study that aren't finished")
    run.add_argument(
        "--jobs",
        type=PROCESSES,
        metavar="N",
        help="runs at a time (default: 1; with --launch slurm, as many as Slurm starts)",
    )
    run.add_argument("--nproc", type=PROCESSES, metavar="N", help="processes a run here (default: one a GPU, or one)")
    run.add_argument(
        "--launch",
        choices=["local", "slurm", "print"],
        default="local",
        help="local: train on this machine (default); slurm: submit an array of jobs, one a run, from a snapshot of"
        " code and configurations; print: only print a line for each run that submits it to Slurm",
    )
    run.add_argument(
        "--script",
        type=Path,
        default=Path("slurm/train_m4.sh"),
        metavar="FILE",
        help="with --launch print, the batch script whose resources the jobs get (default: slurm/train_m4.sh)",
    )
    run.add_argument("--plan", action="store_true", help="predict what the study costs, and train nothing")
    _add_gpu(run)
    _add_resources(run.add_argument_group("what a job gets, with --launch slurm, or is planned for"))
    missing = add("missing", study_commands.missing, "Write the configurations of the unfinished runs, and name them")
    missing.add_argument("--part", metavar="I/N", help="the Ith of N parts only, as a job of an array")
    add("status", study_commands.status, "Show how far a study is")
    add("fit", study_commands.fit, "Fit scaling laws to the finished runs of a study")
    report = add("report", study_commands.report, "Write the report of a study, as far as it has come")
    report.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: the study's)")


def _add_resources(parser: Any) -> None:
    parser.add_argument("--nodes", type=COUNT, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpus-per-node", type=whole(0), default=8, metavar="N", help="GPUs of a node (default: 8)")
    parser.add_argument("--tasks-per-node", type=COUNT, metavar="N", help="ranks a node (default: one a GPU, or one)")
    parser.add_argument("--cpus-per-task", type=COUNT, default=12, metavar="N", help="CPUs a rank (default: 12)")
    parser.add_argument(
        "--timeout-min", type=COUNT, default=1440, metavar="M", help="minutes of a time slice (default: 1440)"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="another option of sbatch, without --"
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=["tar", "ffcv", "both"],
        default="tar",
        help="tar: WebDataset shards (default); ffcv: .beton files, for FFCV; a dataset of shards keeps them and gets"
        " .beton files besides",
    )
    parser.add_argument(
        "--beton-pixels",
        choices=["jpg", "raw"],
        default="jpg",
        help="what .beton files hold: the original JPEGs (default), or pixels, which take far more room",
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=PROCESSES, metavar="N", help="how many at a time (default: one a processor)"
    )


def _add_weights(parser: argparse.ArgumentParser) -> None:
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--raw", action="store_true", help="take the weights as trained (default)")
    weights.add_argument("--ema", action="store_true", help="take their moving average")


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME|FILE",
        help="GPU to plan for, such as h200, or a YAML file that describes one (default: h100)",
    )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launch",
        choices=["auto", "local", "env"],
        default="auto",
        help="local: start processes on this machine; env: be the process that RANK, LOCAL_RANK, WORLD_SIZE,"
        " MASTER_ADDR and MASTER_PORT describe; auto: env where RANK is set, else local (default)",
    )
    parser.add_argument("--nproc", type=PROCESSES, metavar="N", help="processes to start (default: one a GPU, or one)")


def _add_json(parser: argparse.ArgumentParser, help: str = "print JSON") -> None:
    parser.add_argument("--json", action="store_true", help=help)
