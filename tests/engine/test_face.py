"""DeepSpeed is known to one room: no other names it in an import, or one of its own attributes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

OWN = {
    *("basic_optimizer", "bfloat16_enabled", "clip_fp32_gradients", "fp16_enabled", "get_global_grad_norm", "get_lr"),
    *("global_steps", "is_gradient_accumulation_boundary", "loss_scaler", "overflow", "skipped_steps"),
    *("torch_autocast_z0_gradscaler", "zero_optimization_stage", "_hp_mapping"),
}
"""Attributes of DeepSpeed's engine, optimizers and parameters, beside ds_*."""


def named(source: str) -> Iterator[str]:
    """What a module names of DeepSpeed's: imports of it, its attributes, and the engine behind ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "deepspeed")
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from [node.module] if node.module.partition(".")[0] == "deepspeed" else []
        elif isinstance(node, ast.Attribute):
            behind = node.attr == "deepspeed" and ast.unparse(node.value).endswith("engine")
            if behind or node.attr in OWN or node.attr.startswith("ds_"):
                yield ast.unparse(node)


def test_only_the_engine_knows_deepspeed() -> None:
    files = [path for folder in ("convneur", "data", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    inside, outside = (
        {str(path.relative_to(ROOT)): found for path in paths if (found := list(named(path.read_text())))}
        for paths in (
            [path for path in files if path.parent == ROOT / "convneur" / "engine"],
            [path for path in files if path.parent != ROOT / "convneur" / "engine"],
        )
    )
    assert outside == {}
    assert {Path(name).name for name in inside} >= {"build.py", "engine.py", "finite.py", "state.py", "ema.py"}


@pytest.mark.parametrize(
    "line",
    [
        "import deepspeed",
        "def late():\n    from deepspeed.runtime.engine import DeepSpeedEngine",
        "engine.basic_optimizer.param_groups",
        "run.trainer.engine.deepspeed.step()",
        "[p.ds_tensor for p in model.parameters()]",
    ],
)
def test_what_is_deepspeeds_is_seen(line: str) -> None:
    assert list(named(line))


@pytest.mark.parametrize("line", ["config.deepspeed", "from convneur.engine import build", "optimizer.step()"])
def test_what_is_not_is_let_pass(line: str) -> None:
    assert not list(named(line))
