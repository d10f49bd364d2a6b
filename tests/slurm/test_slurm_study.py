"""A study in Slurm's hands: as a submitted array, and by the batch script."""

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_cluster import ENDED, SLURM, Cluster
from small_run import BATCH, small_config

from convneur.config import save_config
from convneur.records.metrics import read_metrics
from convneur.records.summary import Summary, read_summary, write_summary
from convneur.studies.grid import StudyConfig, StudySettings, study_runs
from convneur.studies.series import member_folder, series_folder

pytestmark = pytest.mark.slurm

JOB = ["--nodes", "1", "--gpus-per-node", "0", "--cpus-per-task", "2"]


@pytest.fixture
def study(digits: Path, tmp_path: Path) -> StudyConfig:
    """Four runs of a few steps, of which the first is finished; study.yaml holds it."""
    base = small_config(digits, 1, root="runs", name="study", checkpoint_every_steps=2)
    settings = StudySettings(sizes=["4x1-1-1-1"], unique_images=[4 * BATCH], epochs=[2], seeds=[0, 1])
    config = StudyConfig(**vars(base), study=settings)
    save_config(config, tmp_path / "study.yaml")
    first = replace(next(iter(study_runs(config).values())))
    folder = tmp_path / member_folder(first)
    folder.mkdir(parents=True)
    save_config(first, folder / "config.yaml")
    write_summary(Summary(0.1, None, epochs=2, images=8 * BATCH, seconds=1, checkpoint="none"), folder)
    return config


def names(config: StudyConfig) -> list[str]:
    return [place.name for place in study_runs(config)]


def convneur(cluster: Cluster, folder: Path, *words: str) -> str:
    command = [sys.executable, "-P", "-m", "convneur.launch", *words]
    env = cluster.env | {"COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=env, check=True, text=True, stdout=subprocess.PIPE).stdout


def test_array_trains_what_is_missing_and_nothing_twice(cluster: Cluster, study: StudyConfig, tmp_path: Path) -> None:
    words = ["study", "run", "study.yaml", "--launch", "slurm", "--jobs", "2", *JOB]
    out = convneur(cluster, tmp_path, *words)
    assert "1 of 4 runs are finished, 0 are in the queue already" in out
    jobs = dict(reversed(line.split(", ")[0].removeprefix("job ").split(": ")) for line in out.splitlines()[1:4])
    assert list(jobs) == names(study)[1:]
    assert cluster.job(jobs[names(study)[3]])["ArrayTaskThrottle"] == "2"
    cluster.run("scontrol", "hold", jobs[names(study)[3]])  # which waits, because only two may run
    warned, run = jobs[names(study)[1]], tmp_path / series_folder(study) / names(study)[1]
    cluster.wait(warned, "RUNNING")
    while cluster.job(warned)["Restarts"] == "0":  # a notice before the batch script is up is lost
        assert cluster.job(warned)["JobState"] not in ENDED
        with suppress(subprocess.CalledProcessError):
            cluster.run("scancel", "--batch", "--signal=USR2", warned)
        time.sleep(0.5)
    again = re.fullmatch(r"(\d) of 4 runs are finished, (\d) are .*\n", convneur(cluster, tmp_path, *words))
    assert again
    assert int(again[1]) + int(again[2]) == 4
    assert f"{names(study)[3]} PENDING - " in re.sub(" +", " ", convneur(cluster, tmp_path, "runs", "runs/study"))
    cluster.run("scontrol", "release", jobs[names(study)[3]])
    assert len(list((tmp_path / series_folder(study) / "submitted").iterdir())) == 1

    while cluster.job(warned)["JobState"] not in ENDED | {"RUNNING"}:
        cluster.hurry(warned)
    for name, job in jobs.items():
        assert cluster.wait(job)["JobState"] == "COMPLETED", name
        assert read_summary(tmp_path / series_folder(study) / name)
    assert [r["step"] for r in read_metrics(run) if "train/loss" in r] == list(range(1, 9))
    ends = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines() if '"end"' in line]
    *before, last = [end["outcome"] for end in ends]
    assert last == "finished"
    assert before in ([], ["stopped"])  # a notice may come before there is an attempt to stop
    assert "4 of 4 runs are finished" in convneur(cluster, tmp_path, *words)


def test_script_trains_a_share_of_what_is_missing(cluster: Cluster, study: StudyConfig, tmp_path: Path) -> None:
    options = ["--array=1-2", "--output=%a.log", "-n1", "--gpus-per-node=0", "-c2", SLURM / "study.sh"]
    number = cluster.submit(*options, "study.yaml", "--study.seeds", "[0]", cwd=tmp_path)
    for task in (1, 2):
        log = tmp_path / f"{task}.log"
        assert cluster.wait(f"{number}_{task}")["JobState"] == "COMPLETED", log.read_text()
    assert "attempt" not in (tmp_path / "1.log").read_text()  # its run is the finished one
    assert (tmp_path / "2.log").read_text().count("attempt 1") == 1
    finished = [name for name in names(study) if read_summary(tmp_path / series_folder(study) / name)]
    assert finished == names(study)[:2]
