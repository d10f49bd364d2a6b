"""What the planner predicts, against real steps, the counts of other modules and arithmetic by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from convneur.config import Config, load_config
from convneur.data.errors import InputError
from convneur.launch.cli import main
from convneur.models.convneur.config import ModelConfig
from convneur.models.describe import describe
from convneur.planning.footprint import FLOAT, Layout, largest_micro_batch, peak
from convneur.planning.forecast import Cluster, Plan, Range, make_plan
from convneur.planning.step_trace import Trace, trace_step
from convneur.studies.cost import plan_study, read_study_plan, said_once, save_study_plan
from convneur.studies.grid import StudyConfig, StudySettings, study_runs
from convneur.system.gpu import gpu_called, gpu_names, load_gpu

AUTOCAST = "--deepspeed.torch_autocast={enabled: true, dtype: bfloat16}"


def n1(*overrides: str) -> Config:
    return load_config([], ["--model.variant=n1", AUTOCAST, "--data.root=nowhere", *overrides])


def planned(*overrides: str, nodes: int = 2, gpus: int = 8) -> Plan:
    return make_plan(n1(*overrides), Cluster(load_gpu("h100"), nodes, gpus))


@pytest.fixture(scope="module")
def traces() -> dict[int, Trace]:
    return {images: trace_step(ModelConfig("n1"), images, 64, "autocast") for images in (2, 4, 9)}


@pytest.mark.parametrize(
    ("precision", "options", "stages"),
    [
        ("autocast", ["--accumulation", "2"], [0, 1, 2, 3]),
        ("fp32", ["--recompute"], [0, 1, 2, 3]),
        ("bf16", ["--accumulation", "2"], [1, 2]),
    ],
)
def test_memory_of_real_steps_in_two_processes(
    precision: str, options: list[str], stages: list[int], tmp_path: Path
) -> None:
    options = ["--precision", precision, *options, "--stages", *map(str, stages)]
    words = ["--variants", "n3", "--image-size", "96", "--micro-batch", "3", "--out", tmp_path / "cases.json", *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, ROOT / "benchmarks/planner.py", *words], check=True, cwd=tmp_path, capture_output=True)
    cases = json.loads((tmp_path / "cases.json").read_text())
    assert [case["stage"] for case in cases] == stages
    for case in cases:
        assert case["measured"] > 20 * describe(ModelConfig("n3")).params / 2
        assert abs(case["error"]) < 0.05, case


def test_traced_arithmetic_is_that_of_the_model() -> None:
    trace = trace_step(ModelConfig("m1"), 2, 224, "autocast")
    forward = sum(kernel.flops for kernel in trace.kernels if kernel.forward)
    backward = sum(kernel.flops for kernel in trace.kernels if not kernel.forward)
    assert forward == pytest.approx(2 * 2e9 * describe(ModelConfig("m1")).gmacs, rel=1e-3)
    assert 1.9 < backward / forward < 2.2
    assert sum(shape.numel() for shape in trace.shapes.values()) == describe(ModelConfig("m1")).params


def test_recomputing_takes_less_memory_and_more_arithmetic() -> None:
    kept, again = (trace_step(ModelConfig("n1"), 4, 96, "autocast", recompute=r) for r in (False, True))
    assert max(m.high for m in again.moments) < 0.8 * max(m.high for m in kept.moments)
    assert sum(k.flops for k in again.kernels) > 1.2 * sum(k.flops for k in kept.kernels)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_largest_micro_batch_is_the_last_that_fits(traces: dict[int, Trace], stage: int) -> None:
    how = Layout(stage, 4, "autocast", averages=True, bucket=10**6, offload=False)
    nine = peak(traces[9], how).total
    small, large = (2, traces[2]), (4, traces[4])
    assert largest_micro_batch(small, large, how, nine) == 9
    assert largest_micro_batch(small, large, how, nine - 10**5) == 8
    assert largest_micro_batch(small, large, how, 10**6) == 0


def test_state_by_stage(traces: dict[int, Trace]) -> None:
    """Adam's two moments, and float32 masters, which ZeRO 0 has in the weights themselves."""
    params, ranks = describe(ModelConfig("n1")).params, 4
    held = {s: peak(traces[2], Layout(s, ranks, "autocast", True, 10**6, False)) for s in range(4)}
    assert [held[s].weights for s in range(3)] == [FLOAT * params] * 3
    assert held[3].weights == FLOAT * params // ranks
    assert held[0].optimizer == 2 * FLOAT * params
    assert [held[s].optimizer for s in (1, 2, 3)] == [pytest.approx(3 * FLOAT * params / ranks, abs=8)] * 3
    offloaded = peak(traces[2], Layout(1, ranks, "autocast", True, 10**6, offload=True))
    assert offloaded.optimizer == 0


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_gradients_of_earlier_micro_batches(traces: dict[int, Trace], precision: str) -> None:
    """All of them under ZeRO 0 and 1, this rank's under ZeRO 2, beside activations; ZeRO 3 has its buffer anyway."""
    params, ranks = describe(ModelConfig("n1")).params, 4
    bucket = 10**5  # a small one, or reducing takes more than the activations
    held = [
        [peak(traces[9], Layout(s, ranks, precision, True, bucket, False, several)) for several in (False, True)]
        for s in range(4)
    ]
    assert all("pass" in once.when and "end" not in once.when for once, _ in held)
    more = [several.gradients - once.gradients for once, several in held]
    assert more[2:] == [FLOAT * params // ranks, 0]
    assert [several.gradients for _, several in held[:2]] == [FLOAT * params] * 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_half_precision(stage: int) -> None:
    words = ["--model.variant=n1", "--data.root=nowhere", "--deepspeed.bf16={enabled: true}"]
    config = load_config([], [*words, f"--deepspeed.zero_optimization.stage={stage}"])
    plan = make_plan(config, Cluster(load_gpu("h100"), 1, 8))
    assert plan.precision == "bf16"
    assert sorted(plan.memory) == [1, 2, 3]
    assert plan.memory[stage].weights == 2 * plan.params // (8 if stage == 3 else 1)


def test_communication_by_hand() -> None:
    params = describe(ModelConfig("n1")).params
    assert planned().sent_bytes == pytest.approx(2 * 15 / 16 * 4 * params, rel=1e-6)
    assert planned("--deepspeed.zero_optimization.stage=1").sent_bytes < planned().sent_bytes * 1.1
    assert planned(nodes=1, gpus=1).sent_bytes == 0
    # 7/8 over NVLink; the eighth of each GPU between two nodes.
    seconds = 2 * 4 * params * (7 / 8 / 450e9 + 1 / 2 / 8 / 50e9)
    assert planned().seconds["communication"].low == pytest.approx(seconds, rel=1e-6)


def test_ranges_and_totals() -> None:
    made = planned("--schedule.epochs=2")
    assert made.micro_batch == 64
    assert made.steps == 1_281_167 // 1024 * 2
    assert 0 < made.step_seconds.low < made.step_seconds.high
    assert made.step_seconds.high == pytest.approx(sum(span.high for span in made.seconds.values()))
    assert made.images_per_second.high == pytest.approx(1024 / made.step_seconds.low)
    assert made.hours.low > made.steps * made.step_seconds.low / 3600
    assert made.gpu_hours.high == pytest.approx(16 * made.hours.high)
    assert made.checkpoint_bytes == 16 * made.params
    assert "nowhere isn't there" in made.assumed[0]


def test_what_makes_no_sense_is_said() -> None:
    zero3 = planned("--deepspeed.zero_optimization.stage=3")
    assert any("ZeRO 3 makes no sense here: ZeRO 0 takes" in line for line in zero3.warnings)
    huge = planned("--data.global_batch_size=131072", "--data.workers=200", nodes=1, gpus=1)
    assert huge.largest_micro_batch[0] < 131072
    assert any("131072 images a GPU don't fit" in line for line in huge.warnings)
    assert any("the GPUs will wait for images" in line for line in planned("--data.workers=0").warnings)
    assert not planned("--data.workers=500").warnings


def test_gpus_are_told_apart(tmp_path: Path) -> None:
    assert {"h100", "h200", "a100", "b200"} <= set(gpu_names())
    for called, name in {
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA GH200 480GB": "GH200",
        "NVIDIA A100-SXM4-40GB": "A100 SXM 40 GB",
        "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
        "NVIDIA L40S": "L40S",
    }.items():
        gpu = gpu_called(called)
        assert gpu
        assert gpu.name == name
    assert gpu_called("Radeon") is None
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "convneur/system/gpus/h100.yaml").read_text().replace("memory_gb: 80", "memory_gb: 8"))
    assert load_gpu(str(own)).memory_gb == 8
    own.write_text("name: Half\nmemory_gb: 8\n")
    with pytest.raises(InputError, match=r"own.yaml: has no cuda_names, bandwidth_gbs"):
        load_gpu(str(own))
    with pytest.raises(InputError, match="--gpu is 'h1000', expected one of a100"):
        load_gpu("h1000")


def test_runs_that_differ_in_nothing_a_plan_depends_on_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the seed and the learning rate counts: each plan equals that of its own run."""
    axes = {
        "sizes": ["4x1-1-1-1"],
        "unique_images": [0, 2048],
        "epochs": [1, 2],
        "lrs": [0.001, 0.002],
        "seeds": [0, 1],
    }
    config = StudyConfig(**vars(n1()), study=StudySettings(placements=["none"], **axes))
    planned: list[Config] = []

    def counted(run: Config, cluster: Cluster) -> Plan:
        planned.append(run)
        return make_plan(run, cluster)

    monkeypatch.setattr("convneur.studies.cost.make_plan", counted)
    runs, cluster = study_runs(config), Cluster(load_gpu("h100"), 1, 8)
    plans = plan_study(runs, cluster)
    assert (len(plans), len(planned)) == (16, 4)
    assert all(plans[place] == make_plan(run, cluster) for place, run in runs.items())


def test_what_differs_in_its_numbers_alone_is_said_once() -> None:
    lines = [
        ("n1", "8 workers, 103 needed"),
        ("n1", "8 workers, 103 needed"),
        ("n2", "8 workers, 60 needed"),
        ("n2", "x"),
    ]
    assert [*said_once(lines)] == ["n1: 8 workers, 103 needed (likewise n2)", "n2: x"]
    assert [*said_once([("", "a 1,281,167 b"), ("", "a 3 b")])] == ["a 1,281,167 b (likewise 1 others)"]


@pytest.mark.parametrize("config", sorted((ROOT / "convneur/system/gpus").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_gpu_names_its_source(config: Path) -> None:
    assert "data sheet" in config.read_text().partition("name:")[0]
    load_gpu(config.stem)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--nodes", "2", "--gpu", "h200", "--model.variant", "n1", "--data.root", "nowhere"]
    assert main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["ranks"] == 16
    assert made["memory"]["0"]["total"] < made["capacity"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "on 2 x 8 H200 SXM" in out
    assert all(word in out for word in ("GB of a GPU", "pointwise", "GPU hours", "cores a GPU", "checkpoints"))
    assert main(["plan", "--gpus-per-node", "3", "--model.variant", "n1"]) == 2
    assert "data.global_batch_size is 1024, expected a multiple of 3" in capsys.readouterr().err
    assert main(["plan", "--gpu", "none", "--model.variant", "n1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_study_is_the_sum_of_its_runs(tmp_path: Path) -> None:
    base = n1("--schedule.epochs=3")
    config = StudyConfig(**vars(base), study=StudySettings(sizes=["n1"], seeds=[0, 1]))
    runs, cluster = study_runs(config), Cluster(load_gpu("h100"), 1, 8)
    plans = plan_study(runs, cluster)
    assert list(plans) == list(runs)
    save_study_plan(plans, tmp_path)
    kept = read_study_plan(tmp_path)
    assert kept == {place.name: plan.gpu_hours for place, plan in plans.items()}
    memory, local = (next(p for place, p in plans.items() if place.placement == kind) for kind in ("per_stage", "none"))
    assert memory.gpu_hours.low > local.gpu_hours.low
    assert read_study_plan(tmp_path / "elsewhere") == {}
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"plan\.json: holds no GPU hours; `convneur study run --plan` writes it anew"):
        read_study_plan(tmp_path)
    assert isinstance(next(iter(kept.values())), Range)
