"""`python3 -IB launch/supervise --folder RUN --notice FILE -- srun ... convneur train ...` looks after a job's ranks.

slurm/common.sh runs this folder by its path, outside of any container, so it uses the standard library alone, and its
files import each other by relative names: here the package is called `supervise`.
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # it was the folder itself
runpy.run_module("supervise.supervisor", run_name="__main__")
