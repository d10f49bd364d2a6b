"""What GPUs can do, by their data sheets: one YAML file each in `gpus/`, with its source in its first lines."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from convneur.data.errors import InputError
from convneur.settings import load_as

FOLDER = files("convneur.system") / "gpus"


@dataclass(frozen=True)
class Gpu:
    """A GPU, and how it is connected.

    Attributes:
        name: what people call it.
        cuda_names: words of which one is in the name that CUDA gives it; of several files, the longest word wins.
        memory_gb: its memory, in billions of bytes.
        bandwidth_gbs: bytes a second between it and its memory, in billions.
        half_tflops: dense products of bfloat16 or float16 with float32 sums, 1e12 FLOP/s.
        float_tflops: float32 without tensor cores, 1e12 FLOP/s.
        link_gbs: bytes a second to other GPUs of the node, one direction, in billions.
        network_gbs: bytes a second to other nodes, one direction, in billions.
    """

    name: str
    cuda_names: list[str]
    memory_gb: float
    bandwidth_gbs: float
    half_tflops: float
    float_tflops: float
    link_gbs: float
    network_gbs: float

    def __post_init__(self) -> None:
        for key in ("memory_gb", "bandwidth_gbs", "half_tflops", "float_tflops", "link_gbs", "network_gbs"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}, expected a number above 0")


def gpu_names() -> list[str]:
    """The GPUs that have a file here."""
    return sorted(entry.name.removesuffix(".yaml") for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))


def load_gpu(name: str) -> Gpu:
    """One of `gpu_names`, or what a YAML file of the same keys says. InputError where it is neither."""
    if name in gpu_names():
        return _load(Path(str(FOLDER / f"{name}.yaml")))
    if name.endswith((".yaml", ".yml")):
        return _load(Path(name))
    raise InputError(f"--gpu is {name!r}, expected one of {', '.join(gpu_names())}, or a YAML file such as theirs")


def gpu_called(cuda_name: str) -> Gpu | None:
    """The GPU to which CUDA gives this name; None where no file knows it."""
    known = [(word, gpu) for gpu in map(load_gpu, gpu_names()) for word in gpu.cuda_names]
    found = [(len(word), gpu.name, gpu) for word, gpu in known if re.search(rf"\b{word}\b", cuda_name)]
    return max(found)[2] if found else None


def _load(path: Path) -> Gpu:
    try:
        return load_as(Gpu, [path])
    except TypeError as error:  # a key without a default is missing
        missing = ", ".join(re.findall(r"'(\w+)'", str(error)))
        raise InputError(f"{path}: has no {missing}, expected every key of {FOLDER / 'h100.yaml'}") from error
