"""Where the checkout's files lie, for tests in any folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
RANKS = SUPPORT / "ranks"
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = ROOT / "configs"
SLURM = ROOT / "slurm"
