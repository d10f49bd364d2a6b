"""Precisions, ZeRO stages, offloading, recomputation, compilation and optimizers: a few steps of each, for real."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from places import RANKS
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from convneur.config import load_config
from convneur.data.errors import InputError
from convneur.engine.config import OptimizerConfig, choose_implementation
from convneur.engine.optimizer import build_optimizer
from convneur.limits import check_config
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur

FP32 = [f"fp32-{stage}" for stage in range(4)]
AUTOCAST = [f"autocast-{stage}" for stage in range(4)]
BF16 = [f"bf16-{stage}" for stage in (1, 2, 3)]
OFFLOAD = [f"fp32-{stage}-offload" for stage in (1, 2, 3)]
RECOMPUTE = ["fp32-0-recompute", "autocast-1-recompute", "autocast-3-recompute"]
Results = dict[str, dict[str, Any]]


def run(modes: list[str], timeout: int) -> Results:
    said = run_ranks(RANKS / "engine_modes.py", *modes, size=1, timeout=timeout)
    records = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {record["mode"]: record for record in records}


@pytest.fixture(scope="module")
def results() -> Results:
    return run([*FP32, *AUTOCAST, *BF16, *OFFLOAD, *RECOMPUTE, "fp32-0-lamb"], timeout=1200)


@pytest.mark.parametrize("mode", [*FP32, *AUTOCAST, *BF16, *OFFLOAD])
def test_every_mode_trains_alike(results: Results, mode: str) -> None:
    tolerance = 1e-5 if mode.startswith("fp32") else 0.02
    assert results[mode]["losses"] == pytest.approx(results["fp32-0"]["losses"], rel=tolerance)
    assert results[mode]["losses"][-1] < 0.5 * results[mode]["losses"][0]
    assert results[mode]["optimizer"] == "torch.AdamW"


@pytest.mark.parametrize("mode", [*FP32, *AUTOCAST, *BF16])
def test_the_memory_computes_in_float32(results: Results, mode: str) -> None:
    """Fast weights, their velocities and the inner gradient, forward and backward, whatever surrounds them."""
    assert results[mode]["memory_calls"] == ["backward", "forward"]
    assert results[mode]["memory"] == []


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_recomputing_activations_changes_no_bit(results: Results, mode: str) -> None:
    assert results[mode]["losses"] == results[mode.removesuffix("-recompute")]["losses"]


def test_lamb_takes_other_steps(results: Results) -> None:
    adamw, lamb = results["fp32-0"]["losses"], results["fp32-0-lamb"]["losses"]
    assert results["fp32-0-lamb"]["optimizer"] == "timm.Lamb"
    assert lamb[0] == adamw[0]
    assert adamw[2] < lamb[2] < lamb[1] < lamb[0]


@pytest.mark.slow
def test_torch_compile_through_deepspeed() -> None:
    results = run(["fp32-0", "fp32-0-compile", "autocast-1", "autocast-1-compile"], timeout=1500)
    for mode in ("fp32-0", "autocast-1"):
        tolerance = 1e-5 if mode == "fp32-0" else 0.01
        assert results[f"{mode}-compile"]["losses"] == pytest.approx(results[mode]["losses"], rel=tolerance)
        # The operator of the memory is called as it is, and computes as it does without.
        assert results[f"{mode}-compile"]["memory_calls"] == ["backward", "forward"]


@pytest.mark.slow
def test_deepspeed_cpu_adam() -> None:
    """Compiles DeepSpeed's extension where that has not been done yet: minutes."""
    results = run(["fp32-0", "fp32-0-deepspeed", "fp32-2-offload-deepspeed"], timeout=1500)
    for mode in ("fp32-0-deepspeed", "fp32-2-offload-deepspeed"):
        assert results[mode]["optimizer"] == "deepspeed.DeepSpeedCPUAdam"
        assert results[mode]["losses"] == pytest.approx(results["fp32-0"]["losses"], rel=1e-4)


def test_lamb_follows_the_paper() -> None:
    """Against algorithm 2 of arXiv 1904.00962 in float64, with the identity for phi and bias correction."""
    model = ConvNeur(ModelConfig("n1", num_classes=10, layer_scale=0.1))
    config = OptimizerConfig(name="lamb", lr=0.01, weight_decay=0.1, eps=1e-6)
    optimizer = build_optimizer(model, config, "torch", 32, offload=False)
    weight = model.get_submodule("stages.0.blocks.0.local_branch.up").weight
    assert isinstance(weight, nn.Parameter)
    expected = weight.detach().double()
    m = v = torch.zeros_like(expected)
    for step in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        assert weight.grad is not None
        gradient = weight.grad.double()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
        update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + 0.1 * expected
        expected = expected - 0.01 * expected.norm() / update.norm() * update
        optimizer.step()
    assert torch.allclose(weight.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("implementation", "name", "device", "offload", "message"),
    [
        ("apex", "adamw", "cpu", False, "'apex', but apex runs on CUDA devices only: use auto"),
        ("apex", "adamw", "cuda", True, "'apex', but apex runs on CUDA devices only: use auto"),
        ("apex", "lamb", "cuda", False, "'apex', but apex is missing: .*github.com/NVIDIA/apex: .* pip install"),
        ("deepspeed", "lamb", "cpu", False, "'deepspeed', but DeepSpeed's LAMB runs on CUDA devices only: use auto"),
        ("deepspeed", "adamw", "cuda", False, "compiles it with nvcc, which isn't there: install the CUDA toolkit, or"),
        ("deepspeed", "adamw", "cpu", False, r"compiles it with g\+\+, which isn't there: install g\+\+ \(apt-get"),
    ],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, implementation: Any, name: Any, device: str, offload: bool, message: str
) -> None:
    monkeypatch.setenv("PATH", "")
    config = OptimizerConfig(name=name, implementation=implementation)
    with pytest.raises(InputError, match=message):
        choose_implementation(config, device, offload)


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_implementation(OptimizerConfig(), "cpu", offload=False) == "torch"
    assert choose_implementation(OptimizerConfig(), "cuda", offload=False) == "torch"
    assert choose_implementation(OptimizerConfig(), "cuda", offload=True) == "deepspeed"
    monkeypatch.setenv("PATH", "")
    assert choose_implementation(OptimizerConfig(), "cuda", offload=True) == "torch"
    assert choose_implementation(OptimizerConfig(name="lamb"), "cuda", offload=False) == "torch"


def test_a_lock_left_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    words = ["--optimizer.implementation", "deepspeed"]
    config = load_config(overrides=words)
    check_config(config, world_size=1)
    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    lock.touch()
    with pytest.raises(
        InputError, match=f"^{lock} is there: another process is compiling DeepSpeed's cpu_adam, or was"
    ):
        check_config(config, world_size=1)
    check_config(load_config(), world_size=1)  # PyTorch's optimizer needs no extension


def test_lamb_is_refused_where_parameters_are_cut() -> None:
    words = ["--optimizer.name", "lamb", "--deepspeed.zero_optimization.stage", "1"]
    with pytest.raises(InputError, match="'lamb' at ZeRO stage 1, which cuts parameters into pieces"):
        check_config(load_config(overrides=words), world_size=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA device")
def test_apex_norms_need_cuda() -> None:
    with pytest.raises(InputError, match=r"train\.norm_implementation is 'apex', but there is no CUDA device"):
        check_config(load_config(overrides=["--train.norm_implementation", "apex"]), world_size=1)
