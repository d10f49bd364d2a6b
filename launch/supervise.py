"""`python3 -IB launch/supervise.py --folder RUN --notice FILE -- srun ... convneur train ...` looks after a job.

slurm/common.sh runs this file by its path, outside of any container, so it uses the standard library alone. What it
does is in the folder `supervisor`, whose files import each other by relative names: they are a package of that name.
"""

import runpy
import sys
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    package = ModuleType("supervisor")
    # On sys.path launch/ would put its other files before those of the standard library.
    package.__path__ = [str(Path(__file__).resolve().with_name("supervisor"))]
    sys.modules[package.__name__] = package
    runpy.run_module("supervisor.supervisor", run_name="__main__")
