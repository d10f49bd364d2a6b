"""`python3 -IB launch/supervise --folder RUN --notice FILE -- srun ... convneur train ...` looks after a job's ranks.

slurm/common.sh runs this folder by its path, outside of any container, so it uses the standard library alone, and its
files import each other by relative names: here they are a package called `supervise`.
"""

import runpy
import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("supervise")
# On sys.path launch/ would put its other files before those of the standard library.
package.__path__ = [str(Path(__file__).resolve().parent)]
sys.modules[package.__name__] = package
runpy.run_module("supervise.supervisor", run_name="__main__")
