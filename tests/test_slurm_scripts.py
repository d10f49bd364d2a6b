"""The batch scripts as text, and what of them needs no Slurm."""

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from convneur.check import check_config
from convneur.config import load_config
from convneur.launch.supervise import free_port
from convneur.model import VARIANTS

CHECKOUT = Path(__file__).parents[1]
SLURM = CHECKOUT / "slurm"
TRAIN_SCRIPTS = sorted(SLURM.glob("train_*.sh"))

PREVIEW = """\
sbatch options, each of which can be given another value on the command line of sbatch:
  --job-name=m4
  --nodes=2
  --ntasks-per-node=8
  --gpus-per-node=8
  --cpus-per-task=12
  --time=24:00:00
  --signal=B:USR2@300
  --requeue
  --open-mode=append
log: runs/slurm/m4-JOBID.out
command: srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --cpu-bind=cores \
--mpi=none --kill-on-bad-exit=1 CHECKOUT/slurm/rank.sh CHECKOUT/.venv/bin/convneur train --config \
CHECKOUT/configs/m4.yaml --launch env --resume auto --run.root runs --optimizer.lr 2e-3 --run.name it\\'s\\ m4
"""


def bash(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = ("bash", *map(str, words))
    return subprocess.run(words, env={"PATH": "/usr/bin:/bin"} | env, cwd="/", capture_output=True, text=True)


def directives(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.read_text(), re.MULTILINE))


def test_dry_run_shows_the_whole_job_and_needs_no_slurm() -> None:
    overrides = ["--optimizer.lr", "2e-3", "--dry-run", "--run.name", "it's m4"]
    shown = bash(SLURM / "train_m4.sh", *overrides)
    assert shown.stdout.replace(str(CHECKOUT), "CHECKOUT") == PREVIEW
    assert (shown.returncode, shown.stderr) == (0, "")


def test_outside_of_slurm_a_script_says_how_it_is_used() -> None:
    refused = bash(SLURM / "train_m4.sh")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"sbatch {SLURM}/train_m4.sh" in refused.stderr
    assert "--dry-run" in refused.stderr


def test_every_variant_of_the_paper_has_a_script() -> None:
    names = [script.stem.removeprefix("train_") for script in TRAIN_SCRIPTS]
    assert names == [name for name in VARIANTS if name.startswith("m")]


@pytest.mark.parametrize("script", TRAIN_SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_asks_for_fits_its_recipe(script: Path) -> None:
    asked = directives(script)
    config = load_config([CHECKOUT / "configs" / f"{asked['job-name']}.yaml"])
    assert script.stem == f"train_{asked['job-name']}" == f"train_{config.model.variant}"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    world_size = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    check_config(config, world_size)
    assert config.data.lanes % (world_size * config.train.accumulation) == 0
    assert config.data.workers < int(asked["cpus-per-task"])


def test_scripts_differ_in_name_size_and_what_they_ask_for_only() -> None:
    def common(script: Path) -> str:
        text = script.read_text().replace(script.stem.removeprefix("train_"), "VARIANT")
        text = re.sub(r"ConvNeur-M\d \([\d.]+ M", "ConvNeur-VARIANT (SIZE M", text)
        return re.sub(r"--(nodes|time)=.*", r"--\1=", text)

    assert len({common(script) for script in TRAIN_SCRIPTS}) == 1


def test_a_port_in_use_is_passed_over() -> None:
    first = free_port("127.0.0.1", 7001)
    with socket.create_server(("127.0.0.1", first)):
        assert free_port("127.0.0.1", 7001) > first


def test_shellcheck_finds_nothing() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("NO SHELLCHECK HERE, SO SHELL SCRIPTS GO UNCHECKED: apt-get install shellcheck")
    scripts = [*SLURM.glob("*.sh"), *(CHECKOUT / "scripts").glob("*.sh"), CHECKOUT / ".ci" / "run"]
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=CHECKOUT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
