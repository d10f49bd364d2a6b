"""Guards: in two ranks of which one goes wrong, and the rules by themselves."""

import json
import re
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from places import RANKS
from safetensors.torch import load_file
from small_run import STEPS

from convneur.data.stream.batch import Batch
from convneur.engine.build import build_engine
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.monitoring.checksums import checksum, odd_ranks
from convneur.monitoring.config import GuardConfig
from convneur.monitoring.guards import Guards, spike_limit
from convneur.records.listing import list_checkpoints
from convneur.records.metrics import read_metrics
from convneur.system.world import COLLECTIVE_TIMEOUT, World


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def said(digits: Path, out: Path) -> dict[str, str]:
    """What each rank said in each scene."""
    run_ranks(RANKS / "faults.py", digits, out)
    return {path.stem: path.read_text() for path in out.glob("*.txt")}


@pytest.mark.parametrize("stage", range(4))
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(said: dict[str, str], stage: int) -> None:
    """Weights, moments and step counts stay as they are, to the bit, and the next step changes them again."""
    for rank in range(2):
        assert "same [False, True, False] skipped 1" in said[f"skip-{stage}.{rank}"]
    warning = "warning: step 2 was skipped: its gradients are not finite; 1 skipped so far; its samples are "
    assert warning in said[f"skip-{stage}.0"]


def test_after_bad_steps_in_a_row_a_run_goes_back_once_and_then_stops(said: dict[str, str], out: Path) -> None:
    folder = out / "back" / "checkpoints"
    alarm = f"ALARM: 2 bad steps in a row from step 5 on: back to the weights of {folder / 'step-00000004'}"
    assert alarm in said["back.0"]
    assert "the samples of steps 4 to 6 are passed over" in said["back.0"]
    assert "NonFiniteError: 2 bad steps in a row from step 9 on, and the run has gone back once" in said["back.0"]
    names = [path.name for path in list_checkpoints(folder)]
    assert names == ["step-00000008", "step-00000007", "step-00000004"]
    for name in ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        a, b = (load_file(folder / step / f"{name}.safetensors") for step in names[1:])
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((folder / "step-00000008" / "state.json").read_text())["went_back"]


def test_a_run_that_made_no_step_is_not_finished(said: dict[str, str], out: Path) -> None:
    for rank in range(2):
        assert "NonFiniteError: all 2 steps were skipped, as their gradients were not finite" in said[f"none.{rank}"]
    assert not (out / "none" / "summary.json").exists()


def test_a_flipped_bit_of_a_weight_ends_the_run(said: dict[str, str]) -> None:
    assert "CorruptionError: after 4 steps the ranks hold different values of head.fc.weight" in said["flip.0"]


def test_the_slow_rank_is_named(said: dict[str, str]) -> None:
    assert re.search(r"warning: rank 1 on \S+ holds the others up: its data and forward passes take", said["slow.0"])
    assert "holds the others up" not in said["skip-1.0"]


def test_a_rank_that_can_t_write_keeps_nobody_waiting(said: dict[str, str], out: Path) -> None:
    """Neither rank waits for the other, and both go on."""
    assert (
        "ALARM: after 4 steps writing the checkpoint failed on rank 1: OSError: [Errno 28] No space" in said["disk.0"]
    )
    assert len(list_checkpoints(out / "disk" / "checkpoints")) == 2
    assert read_metrics(out / "disk")[-1]["step"] == STEPS
    seconds = json.loads((out / "disk" / "summary.json").read_text())["seconds"]
    assert seconds < COLLECTIVE_TIMEOUT.total_seconds()


def test_spikes() -> None:
    noise = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(200, generator=noise)).tolist()
    assert max(losses) < spike_limit(losses, 10) < 5
    assert spike_limit([*losses[:190], *[50.0] * 10], 10) < 5  # outliers don't move it
    assert spike_limit([2.0] * 200, 10) == pytest.approx(2.2)
    assert spike_limit(losses[:5], 10) == float("inf")


def test_spikes_in_a_row_are_named_with_their_samples_and_send_a_run_back(world: World) -> None:
    """One alone is named; from the third in a row on there is a step to go back to, where the row began."""
    said: list[str] = []
    model = ConvNeur(ModelConfig("n1", num_classes=10))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine = build_engine(model, optimizer, {"train_batch_size": 4, "zero_optimization": {"stage": 0}})
    config = GuardConfig(max_bad_steps=3, spike=10)
    guards = Guards(config, world, engine, None, lambda sample: f"train/000{sample}", 32, said.append)
    losses = [2.0 + 0.01 * (number % 5) for number in range(40)]
    losses[25] = 7.0
    losses[36:39] = [9.0, 6.0, 8.0]
    back = []
    for number, loss in enumerate(losses):
        samples = torch.arange(4) + 10 * number
        images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
        batch = Batch(images, samples, samples, epoch=0, step=number, lanes=range(1), repetitions=samples)
        guards.observe(number, [batch], torch.tensor(loss))
        if number % 10 == 9:
            back.append(guards.review())
    assert back == [None, None, None, 36]
    assert [line.partition(",")[0] for line in said] == [
        f"warning: the loss of step {step} is {losses[step]:.4g}" for step in (25, 36, 37, 38)
    ]
    assert said[0].endswith("its samples are train/000250, train/000251, train/000252, train/000253")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    words = {torch.float32: (torch.int32, 32), torch.bfloat16: (torch.int16, 16), torch.int8: (torch.uint8, 8)}
    word, width = words[dtype]
    for bit in range(width):
        flipped = weight.clone()
        flipped.view(word)[1, 2] ^= torch.tensor(1).bitwise_left_shift(bit).to(word)
        assert checksum(flipped) != checksum(weight)


def test_the_rank_that_differs_is_named() -> None:
    sums = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 7, 3], [1, 2, 3]])
    assert odd_ranks(sums, ["a", "b", "c"]) == "rank 2 holds other values of b than the other ranks"
    assert odd_ranks(sums[:2], ["a", "b", "c"]) is None
    assert odd_ranks(sums[1:3], ["a", "b", "c"]) == (
        "the ranks hold different values of b; which of them is wrong, so few can't tell"
    )
