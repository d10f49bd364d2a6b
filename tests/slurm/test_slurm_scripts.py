"""The batch scripts as text, and what of them needs no Slurm."""

import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from places import ROOT
from slurm_cluster import go_untested
from submitit.slurm.slurm import _make_sbatch_string

from convneur.config import load_config
from convneur.data.errors import InputError
from convneur.launch.cli import main
from convneur.launch.submit import Resources, executor
from convneur.launch.supervisor.supervisor import free_port
from convneur.limits import check_config
from convneur.models.convneur.config import VARIANTS
from convneur.settings import load_as
from convneur.studies.grid import StudyConfig

SLURM = ROOT / "slurm"
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
--mpi=none --kill-on-bad-exit=1 ROOT/slurm/rank.sh ROOT/.venv/bin/convneur train --config \
ROOT/configs/m4.yaml --launch env --resume auto --run.root runs --optimizer.lr 2e-3 --run.name it\\'s\\ m4
"""

STUDY_PREVIEW = """\
runs: ROOT/.venv/bin/convneur study missing a\\ study.yaml --run.root runs --study.seeds \\[0\\]
sbatch options, each of which can be given another value on the command line of sbatch:
  --job-name=study
  --nodes=1
  --ntasks-per-node=8
  --gpus-per-node=8
  --cpus-per-task=12
  --time=24:00:00
  --signal=B:USR2@300
  --requeue
  --open-mode=append
log: runs/slurm/study-JOBID.out
command: srun --nodes=1 --ntasks=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --cpu-bind=cores \
--mpi=none --kill-on-bad-exit=1 ROOT/slurm/rank.sh ROOT/.venv/bin/convneur train --config FILE --launch env \
--resume auto
"""

SUBMITTED = """\
#!/bin/bash

# Parameters
#SBATCH --array=0-2%3
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=4
#SBATCH --job-name=digits
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/runs/submitted/digits-TIME/jobs/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=B:USR2@300
#SBATCH --time=90
#SBATCH --wckey=submitit

# setup
export CONVNEUR_EARLY_NOTICE=
trap CONVNEUR_EARLY_NOTICE=yes HUP INT QUIT ALRM TERM USR1 USR2

# command
export SUBMITIT_EXECUTOR=slurm
exec env --block-signal=HUP,INT,QUIT,ALRM,TERM,USR1,USR2 PYTHON -u -m submitit.core._submit \
FOLDER/runs/submitted/digits-TIME/jobs
"""


def bash(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = ("bash", *map(str, words))
    return subprocess.run(words, env={"PATH": "/usr/bin:/bin"} | env, cwd="/", capture_output=True, text=True)


def tool(path: Path, text: str) -> None:
    """Writes a program in the place of one of the system's or of Slurm's."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def directives(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.read_text(), re.MULTILINE))


def test_dry_run_shows_the_whole_job_and_needs_no_slurm() -> None:
    overrides = ["--optimizer.lr", "2e-3", "--dry-run", "--run.name", "it's m4"]
    shown = bash(SLURM / "train_m4.sh", *overrides)
    assert shown.stdout.replace(str(ROOT), "ROOT") == PREVIEW
    assert (shown.returncode, shown.stderr) == (0, "")


def test_dry_run_of_a_study_shows_how_it_finds_its_runs() -> None:
    shown = bash(SLURM / "study.sh", "a study.yaml", "--dry-run", "--study.seeds", "[0]")
    assert shown.stdout.replace(str(ROOT), "ROOT") == STUDY_PREVIEW
    assert (shown.returncode, shown.stderr) == (0, "")


def test_text_that_submit_gives_to_sbatch_needs_no_slurm(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["submit", "--config", str(ROOT / "configs" / "digits.yaml"), "--data.root", str(digits)]
    words += ["--nodes", "2", "--gpus-per-node", "4", "--timeout-min", "90", "--array", "3", "--sbatch=partition=gpu"]
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out.replace(str(tmp_path), "FOLDER").replace(sys.executable, "PYTHON")
    assert re.sub(r"digits-\d{8}-\d{6}", "digits-TIME", shown) == SUBMITTED
    assert main(words) == 2
    assert "there is no sbatch here: submit on a login node" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


WORDS = "--run.name /a/b c"
ANSWERS = {
    # What scontrol shows of the job's script, from where the job was submitted, and where common.sh is taken from.
    "as it is": ("CHECKOUT/slurm/train_m4.sh", "/", "CHECKOUT"),
    "with words": (f"CHECKOUT/slurm/train_m4.sh {WORDS}", "/", "CHECKOUT"),
    "renamed": (f"CHECKOUT/slurm/a copy {WORDS}", "/", "CHECKOUT"),
    "linked": (f"FOLDER/a link.sh {WORDS}", "/", "CHECKOUT"),
    "from another checkout": ("CHECKOUT/slurm/train_m4.sh", "OTHER", "CHECKOUT"),
    "copied elsewhere": (f"FOLDER/mine.sh {WORDS}", "OTHER", "OTHER"),
    "copied elsewhere, from slurm": (f"FOLDER/mine.sh {WORDS}", "OTHER/slurm", "OTHER"),
    "not on this node": ("/nowhere/slurm/train_m4.sh", "OTHER", "OTHER"),
    "silent": ("", "OTHER", "OTHER"),
    "nowhere": (f"FOLDER/mine.sh {WORDS}", "/", ""),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_copy_that_slurm_runs_finds_the_checkout(tmp_path: Path, case: str) -> None:
    places = {"CHECKOUT": tmp_path / "a checkout", "OTHER": tmp_path / "other", "FOLDER": tmp_path}
    for name in ("CHECKOUT", "OTHER"):
        shutil.copytree(SLURM, places[name] / "slurm")
    script = places["CHECKOUT"] / "slurm" / "train_m4.sh"
    for copy in (script.with_name("a copy"), tmp_path / "mine.sh", tmp_path / "slurm_script"):
        shutil.copy(script, copy)
    (tmp_path / "a link.sh").symlink_to(script)
    answer, submitted_from, home = (re.sub(r"[A-Z]{5,}", lambda m: str(places[m[0]]), text) for text in ANSWERS[case])
    tool(tmp_path / "bin" / "scontrol", f"echo '   Command={answer}'" if answer else "exit 1")
    tool(tmp_path / "bin" / "sleep", f"echo $1 >>'{tmp_path}/slept'")
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": submitted_from}
    shown = bash(tmp_path / "slurm_script", "--dry-run", **env)
    slept = (tmp_path / "slept").read_text().split() if (tmp_path / "slept").exists() else []
    assert sum(map(int, slept)) == (51 if case == "silent" else 0)
    if home:
        assert (shown.returncode, shown.stderr) == (0, "")
        assert f"{home}/slurm/rank.sh" in shlex.split(shown.stdout.splitlines()[-1])
    else:
        assert (shown.returncode, shown.stdout) == (2, "")
        assert shown.stderr == f"{tmp_path}/mine.sh: no common.sh beside it; submit it from slurm/ or a checkout\n"


def test_a_script_is_run_from_anywhere_without_slurm(tmp_path: Path) -> None:
    (tmp_path / "a link").symlink_to(SLURM / "train_m4.sh")
    shutil.copy(SLURM / "train_m4.sh", tmp_path / "mine.sh")
    for script, folder in ((tmp_path / "a link", "/"), ("train_m4.sh", SLURM), (tmp_path / "mine.sh", ROOT)):
        env = {"PATH": "/usr/bin:/bin"}
        shown = subprocess.run(["bash", script, "--dry-run"], cwd=folder, env=env, capture_output=True, text=True)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert f"{ROOT}/slurm/rank.sh" in shlex.split(shown.stdout.splitlines()[-1])


def test_all_scripts_find_the_checkout_alike() -> None:
    scripts = [path for path in SLURM.glob("*.sh") if "Slurm runs a copy of this file" in path.read_text()]
    assert {path.name for path in scripts} == {
        *(p.name for p in TRAIN_SCRIPTS),
        "study.sh",
        "eval.sh",
        "prepare_imagenet.sh",
        "tile.sh",
    }
    found = {
        path.read_text().partition("# Slurm runs a copy")[2].partition('\n. "$home/common.sh"\n')[0] for path in scripts
    }
    assert len(found) == 1


SITE = """
export PROJ=$NOT_SET_ANYWHERE
false
false | true
cd /
set -- other words
set -f -C -u; set -e; set +e; set +u
say() { echo theirs; }
train() { echo theirs; }
cd() { echo theirs; }
IFS=:
checkout=/nowhere
runs=elsewhere
echo printed
"""


def preview(folder: Path, site: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What a script of a copied checkout with blanks and quotes in its path shows, with lines added to its site.sh."""
    shutil.copytree(SLURM, folder / "it's a copy" / "slurm")
    with (folder / "it's a copy" / "slurm" / "site.sh").open("a") as file:
        file.write(site)
    return bash(folder / "it's a copy" / "slurm" / "train_m4.sh", "--dry-run", "--run.name", "a b", **env)


def test_site_settings_are_read_as_by_any_shell(tmp_path: Path) -> None:
    shown = preview(tmp_path, SITE, CDPATH="/usr")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("printed\nsbatch options")
    command = shlex.split(shown.stdout.splitlines()[-1])
    assert command[-4:] == ["--run.root", "elsewhere", "--run.name", "a b"]
    assert f"{tmp_path}/it's a copy/slurm/rank.sh" in command


@pytest.mark.parametrize("line", ["exit 0", "set -e; false", "set -u; echo $NOT_SET_ANYWHERE"])
def test_site_settings_that_end_the_job_are_named(tmp_path: Path, line: str) -> None:
    ended = preview(tmp_path, f"{line}\n")
    assert ended.returncode == 2
    assert "slurm/site.sh has ended the job" in ended.stderr.splitlines()[-1]


def test_resume_says_where_a_run_begins_and_auto_how_it_goes_on() -> None:
    for words in (["--resume", "/a run"], ["--resume=/a run"]):
        shown = bash(SLURM / "train_m4.sh", *words, "--dry-run")
        command = shlex.split(shown.stdout.splitlines()[-1])
        assert command[command.index("--resume") + 1] == "auto"
        assert command[-1] == "--begin=/a run"


@pytest.mark.parametrize("value", ["a\n#SBATCH --uid=0", "a\rb", "a\x0bb", "a\u2028b"])
def test_names_that_would_be_lines_of_a_script_are_refused(value: str) -> None:
    config = load_config([ROOT / "configs" / "m4.yaml"])
    for run in (replace(config.run, name=value), replace(config.run, root=value)):
        with pytest.raises(InputError, match="expected no line ends"):
            check_config(replace(config, run=run), 8)


def test_nothing_in_a_name_or_a_path_becomes_part_of_a_script(tmp_path: Path) -> None:
    folder, python = tmp_path / "$(touch x) 'a' b", "/a b/$(touch x)/python"
    made = executor(folder, "$(touch x)'\"; #SBATCH --x", Resources(1, 0, 1, 1, 60, {}), python)
    text = _make_sbatch_string(made._submitit_command_str, made.folder, **made.parameters)
    assert "--job-name='" in text
    assert "touch x" not in next(line for line in text.splitlines() if "--job-name" in line).replace("_touch x_", "")
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("exec ")))
    assert (words[3], words[-1]) == (python, str(folder))


CHECK = """
. "$1/common.sh"
wait_for_notice() { echo "waits $1"; }
ranks=2 supervisor_options=(--no-requeue)
echo 0 >"$2"
answer() { n=$(($(cat "$2") + 1)); echo $n >"$2"; set -- $ANSWERS; shift $((n - 1)); echo plan; return $1; }
command=(answer x "$2")
check && echo "plan: $plan" || echo "status $?"
"""


@pytest.mark.parametrize(
    ("answers", "restarts", "waits", "end"),
    [
        ("74 74 0", "0", [15, 30], "plan: plan"),
        ("74 2 0", "0", [15, 30], "plan: plan"),  # a folder that is missing in an outage
        ("2 2 0", "1", [15, 30], "plan: plan"),  # or since the job's first start
        ("2", "0", [], "status 2"),
        ("2 2 2 2 2 2", "1", [15, 30, 60, 120, 240], "status 2"),
        ("1 74 1 1", "0", [15, 30, 60], "status 1"),
    ],
)
def test_the_check_waits_for_storage(tmp_path: Path, answers: str, restarts: str, waits: list[int], end: str) -> None:
    script = tmp_path / "check.sh"
    script.write_text(CHECK)
    done = bash(script, SLURM, tmp_path / "count", ANSWERS=answers, SLURM_RESTART_COUNT=restarts)
    lines = done.stdout.splitlines()
    assert lines[-1] == end, done.stderr
    assert [line for line in lines if line.startswith("waits")] == [f"waits {seconds}" for seconds in waits]
    assert sum("the check ended with status" in line for line in lines) == len(waits)


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
    config = load_config([ROOT / "configs" / f"{asked['job-name']}.yaml"])
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
        go_untested("NO SHELLCHECK HERE, SO SHELL SCRIPTS GO UNCHECKED: apt-get install shellcheck")
    scripts = [*SLURM.glob("*.sh"), *(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_study_that_was_never_submitted_has_a_status_without_a_cluster(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    words = ["study", "status", str(ROOT / "configs" / "studies" / "digits.yaml")]
    words += ["--run.root", str(tmp_path), "--data.root", str(digits)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "0 of" in shown
    assert "note:" not in shown
    (tmp_path / load_as(StudyConfig, [Path(words[2])], []).run.name / "submitted").mkdir(parents=True)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "note: Slurm doesn't answer squeue (slurm_load_jobs error: Unable to contact slurm controller)" in shown
