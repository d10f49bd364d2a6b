"""Memory that a training process has had stays with it."""

import platform
import subprocess
import sys

import pytest

# Twice 16 MB, freed together at the end of the heap, as at the end of a step.
STEPS = """
import resource, sys, torch
from convneur.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    return [torch.ones(2**22) for _ in range(8)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    run = [sys.executable, "-c", STEPS]
    faults = [
        int(subprocess.run([*run, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "default")
    ]
    assert faults[0] < 100 < faults[1]
