"""What this machine has of what ConvNeur uses, and what each missing part costs."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from typing import NamedTuple

from convneur.system.apex import examine_apex
from convneur.system.finding import Finding


class Package(NamedTuple):
    """What is installed under which name, imported under which, and what its absence costs."""

    distribution: str
    module: str
    cost: str


REQUIRED_PACKAGES = (
    Package("torch", "torch", "nothing runs"),
    Package("torchvision", "torchvision", "timm doesn't import, so nothing runs"),
    Package("timm", "timm", "no model can be built"),
    Package("deepspeed", "deepspeed", "no training"),
    Package("webdataset", "webdataset", "no shards can be written or read"),
    Package("simplejpeg", "simplejpeg", "JPEG images can't be decoded"),
    Package("opencv-python", "cv2", "images can't be resized"),
    Package("pillow", "PIL", "images can't be decoded"),
    Package("google-crc32c", "google_crc32c", "shards can't be checked for damage"),
    Package("numpy", "numpy", "nothing runs"),
    Package("safetensors", "safetensors", "no checkpoints"),
    Package("scikit-learn", "sklearn", "`convneur prepare digits` doesn't work"),
    Package("scipy", "scipy", "`convneur prepare` doesn't work"),
    Package("submitit", "submitit", "no jobs for Slurm"),
    Package("tensorboard", "torch.utils.tensorboard", "no training: it writes TensorBoard events"),
    Package("matplotlib", "matplotlib", "no training: it draws its curves"),
    Package("psutil", "psutil", "`convneur bench` doesn't work"),
    Package("jsonargparse", "jsonargparse", "no configuration can be loaded"),
    Package("pyyaml", "yaml", "no configuration can be loaded"),
    Package("rich", "rich", "no output"),
    Package("wrapt", "wrapt", "nothing runs"),
)

_FFCV = Package("ffcv", "ffcv", "no data.engine ffcv, no .beton files; data come from WebDataset shards")
_COMPILERS = {
    "g++": "images are decoded several times slower, and the neural memory computes slower on CPUs; FFCV and"
    " DeepSpeed's CPU extensions can't be built",
    "nvcc": "apex and DeepSpeed's CUDA extensions can't be built; PyTorch's own kernels are used",
    "ninja": "DeepSpeed can't build its extensions",
}


def examine() -> list[Finding]:
    """Looks at everything. Imports the packages, which takes seconds; starts no process but version queries."""
    python = Finding("packages", "python", "ok", ".".join(map(str, sys.version_info[:3])), required=True)
    torch = examine_package(REQUIRED_PACKAGES[0], required=True)
    if torch.status == "ok":
        from convneur.system.world import name_accelerator

        name_accelerator()
    return [
        python,
        torch,
        *(examine_package(package, required=True) for package in REQUIRED_PACKAGES[1:]),
        examine_package(_FFCV, required=False),
        _survived("packages", "apex", examine_apex),
        _survived("data", "native input path", examine_input),
        *(_examine_accelerators() if torch.status == "ok" else ()),
        _survived("cluster", "slurm", examine_slurm),
        *(_examine_tool("compilers", name, cost) for name, cost in _COMPILERS.items()),
    ]


def is_healthy(findings: list[Finding]) -> bool:
    """Whether everything that ConvNeur can't do without works."""
    return all(finding.status == "ok" for finding in findings if finding.required)


def examine_package(package: Package, required: bool) -> Finding:
    """Imports a package, since one that is installed may still not work with the others."""
    distribution, module, cost = package
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Finding("packages", distribution, "missing", None, f"{cost}; pip install {distribution}", required)
    except Exception as error:
        return Finding("packages", distribution, "broken", None, f"{cost}: {_reason(error)}", required)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
    except (Exception, SystemExit) as error:  # extensions fail to load with all kinds of exceptions
        return Finding("packages", distribution, "broken", version, f"{cost}: {_reason(error)}", required)
    return Finding("packages", distribution, "ok", version, required=required)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _survived(group: str, name: str, examine_it: Callable[[], Finding]) -> Finding:
    """What an examination finds; where it fails itself, that: one broken thing hides no other."""
    try:
        return examine_it()
    except Exception as error:
        return Finding(group, name, "broken", None, _reason(error))


def _examine_accelerators() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    yield Finding("accelerators", "CPU", "ok", f"{cores} cores")
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if driver:
            note = f"PyTorch, built for CUDA {torch.version.cuda}, can't use the GPUs: training runs on the CPU"
            yield Finding("accelerators", "CUDA", "broken", f"driver {driver}", note)
        else:
            yield Finding("accelerators", "CUDA", "missing", None, "training runs on the CPU")
        yield Finding("accelerators", "NCCL", "missing", None, "ranks talk through gloo")
        return
    for index in range(torch.cuda.device_count()):
        yield _survived("accelerators", f"cuda:{index}", partial(_examine_gpu, index))
    yield Finding("accelerators", "CUDA", "ok", f"{torch.version.cuda}, driver {driver or 'of unknown version'}")
    if torch.distributed.is_nccl_available():
        yield Finding("accelerators", "NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("accelerators", "NCCL", "missing", None, "no training on several GPUs")


def _examine_gpu(index: int) -> Finding:
    import torch

    device = torch.cuda.get_device_properties(index)
    version = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute {device.major}.{device.minor}"
    return Finding("accelerators", f"cuda:{index}", "ok", version)


def examine_input() -> Finding:
    """Compiles the input path unless it has been, and compares it with the libraries whose pixels it is to have."""
    from convneur.data.native import lack
    from convneur.data.native.operations import augments_as_timm
    from convneur.data.native.view import can_show

    cost = "images are decoded and augmented several times slower, to the same bits"
    if reason := lack():
        return Finding("data", "native input path", "missing", None, f"{cost}: {reason}")
    others = [f"data.interpolation {name}" for name in ("bicubic", "bilinear", "area") if not can_show(name)]
    others += [] if augments_as_timm() else ["RandAugment"]
    if others:
        versions = f"Pillow {metadata.version('pillow')}, OpenCV {metadata.version('opencv-python')}"
        note = f"{cost}, with {', '.join(others)}: {versions} make other pixels than it was written after"
        return Finding("data", "native input path", "wrong", None, note)
    return Finding("data", "native input path", "ok", "to the bits of Pillow and OpenCV")


def examine_slurm() -> Finding:
    """Looks for Slurm's programs, and asks for its partitions."""
    tools = ("sbatch", "srun", "sinfo")
    absent = [tool for tool in tools if not shutil.which(tool)]
    cost = "no jobs can be submitted from here"
    if len(absent) == len(tools):
        return Finding("cluster", "slurm", "missing", None, f"{cost}; local training needs none")
    if absent:
        return Finding("cluster", "slurm", "broken", None, f"{', '.join(absent)} not found: {cost}")
    version = _first_line("sinfo", "--version")
    if not _first_line("sinfo", "--noheader"):
        return Finding("cluster", "slurm", "broken", version, f"sinfo lists no partition: {cost}")
    return Finding("cluster", "slurm", "ok", version)


def _examine_tool(group: str, name: str, cost: str) -> Finding:
    # nvcc tells its release in a line further down.
    version = _output(name, "--version")
    if version is None:
        return Finding(group, name, "missing", None, cost)
    release = re.search(r"\d+(\.\d+)+", version)
    return Finding(group, name, "ok", release.group() if release else version.partition("\n")[0])


def _first_line(*command: str) -> str | None:
    output = _output(*command)
    return output.partition("\n")[0] if output else None


def _output(*command: str) -> str | None:
    """What a command prints; None where it isn't there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
