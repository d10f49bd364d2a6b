"""Gradient norms, clipping and the scale of float16, on two ranks, against a whole model's float64 gradient."""

import json
from typing import Any

import pytest
from forked import run_ranks
from places import RANKS

LIMIT = 0.5
HALF = "fp16-autocast"
MODES = {
    **{f"fp32-{stage}-{accumulation}": 1e-6 for stage in range(4) for accumulation in (1, 2)},
    **{f"{HALF}-{stage}-2": 5e-4 for stage in range(4)},
    **{f"{HALF}-{stage}-2-offload": 5e-4 for stage in (1, 2, 3)},
    **{f"bf16-autocast-{stage}-2": 3e-3 for stage in range(4)},
    **{f"bf16-{stage}-2": 3e-3 for stage in (1, 2, 3)},
}
"""How far each mode's norm may be off: by its precision."""


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    said = run_ranks(RANKS / "gradient_norms.py")
    records = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return {record["mode"]: record for record in records}


@pytest.mark.parametrize("mode", MODES)
def test_norms_and_clipping(told: dict[str, dict[str, Any]], mode: str) -> None:
    result = told[mode]
    assert result["expected"] > 2 * LIMIT
    assert result["norm"] == pytest.approx(result["expected"], rel=MODES[mode])
    assert result["clipped"] == pytest.approx(LIMIT, rel=1e-4)


@pytest.mark.parametrize("stage", range(4))
def test_the_scale_of_float16(told: dict[str, dict[str, Any]], stage: int) -> None:
    """As torch.amp.GradScaler documents it: from 2^16, halved by an overflow, doubled after 2,000 steps without one."""
    result = told[f"scale-{stage}"]
    scale = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
    after = {"steps": 1, "loss_scale": scale | {"scale": 2.0**15}, "global_steps": 2, "skipped_steps": 1}
    assert result["overflow"] == after
    assert result["restored"]
    assert result["grown"] == scale | {"scale": 2.0**16}
    # The step after which it grows is itself divided by the scale that it was made with.
    assert result["norm"] == pytest.approx(result["expected"], rel=5e-4)
    assert result["clipped"] == pytest.approx(LIMIT, rel=1e-4)
