"""Runs of two ranks, and whether they are equal to the bit."""

import os
from pathlib import Path

import torch
from places import SUPPORT
from safetensors.torch import load_file

from convneur.records.listing import list_checkpoints

MOMENTS = ["optimizer/exp_avg.safetensors", "optimizer/exp_avg_sq.safetensors"]
PATHS = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[0]


def assert_same_files(first: Path, second: Path) -> None:
    """Weights, averages, both moments and step counts are equal to the bit."""
    files = sorted(str(p.relative_to(first)) for p in first.rglob("*.safetensors"))
    assert files == ["ema.safetensors", "model.safetensors", *MOMENTS]
    assert files == sorted(str(p.relative_to(second)) for p in second.rglob("*.safetensors"))
    for name in files:
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        assert len(a) > 100
        assert all(torch.equal(bits(a[key]), bits(b[key])) for key in a), name
    assert (first / "optimizer.json").read_text() == (second / "optimizer.json").read_text()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)  # 0 and -0 are equal as numbers
