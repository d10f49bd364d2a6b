"""Starting the ranks of one machine with torchrun, and saying why they failed."""

import logging
import os
import sys
from signal import Signals
from tempfile import TemporaryDirectory

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, get_error_handler
from torch.distributed.run import parse_args, run

from convneur.data.errors import InputError


def rank_count(nproc: int | None) -> int:
    """Processes to start: as many as asked for, else one a GPU, else one. InputError where they can't be."""
    gpus = torch.cuda.device_count()
    if nproc is None:
        return max(1, gpus)
    if nproc < 1 or (gpus and nproc > gpus):
        raise InputError(f"--nproc is {nproc}, expected {f'1 to {gpus}, at most one a GPU' if gpus else 'at least 1'}")
    return nproc


def set_thread_count(nproc: int) -> None:
    """Divides the processors among `nproc` ranks, unless OMP_NUM_THREADS says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))


def run_ranks(words: list[str], nproc: int) -> int:
    """Runs `convneur WORDS` in `nproc` processes that know of each other, and returns the exit status.

    It is that of the first rank to fail. What a rank hands to `report_failure` is printed here, once. Signals go on to
    the ranks; none is left behind.
    """
    set_thread_count(nproc)
    with TemporaryDirectory(prefix="convneur-ranks-") as log_dir:
        torchrun = ["--standalone", f"--nproc-per-node={nproc}", f"--log-dir={log_dir}", "--no-python"]
        # -P: modules are not looked for in the working folder, which may be a checkout.
        convneur = [sys.executable, "-P", "-m", "convneur.launch", *words]
        logging.disable()  # torchrun's account of a failure; `_explain` gives it in a line
        try:
            run(parse_args([*torchrun, *convneur]))
        except SignalException as signal:
            return 128 + signal.sigval
        except ChildFailedError as error:
            return _explain(error)
        finally:
            logging.disable(logging.NOTSET)
    return 0


def report_failure(error: Exception) -> bool:
    """Leaves an error where the launcher of this rank finds it; False if that isn't torchrun, or the disk is full."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    try:
        get_error_handler().record_exception(error)
    except OSError:
        return False
    return True


def _explain(error: ChildFailedError) -> int:
    """Says in one line why the ranks stopped; the exit status of the one that failed first."""
    rank, failure = error.get_first_failure()
    status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if isinstance(failure.message, dict):  # from report_failure: "InputError: what is wrong"
        kind, _, reason = failure.message["message"].partition(": ")
        # Another rank's end may have had this one killed before it could end by itself.
        status = 2 if kind == InputError.__name__ else 1
    elif failure.exitcode < 0:
        reason = f"rank {rank} was killed by {Signals(-failure.exitcode).name}"
    else:
        reason = f"rank {rank} failed with exit status {failure.exitcode}; its traceback is above"
    print(f"convneur: error: {reason}", file=sys.stderr)
    return status
