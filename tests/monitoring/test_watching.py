"""What a run says of itself: gauges in every line, gates at every evaluation, a trace, and curves."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import STEPS, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from convneur.config import load_config
from convneur.data.errors import InputError
from convneur.data.stores.choose import open_store
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.on_device import Normalize
from convneur.launch.cli import main
from convneur.limits import check_config
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.monitoring.gauges import step_flops
from convneur.records.listing import list_checkpoints
from convneur.records.log import Records
from convneur.records.metrics import read_metrics
from convneur.system.world import World
from convneur.train import train


@pytest.fixture(scope="module")
def run(digits: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profiled run of one rank; what it has printed is in log.txt."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("convneur.records.display.Display.say", lambda _, line: lines.append(line))
        train(small_config(digits, 0, autocast=False), world, folder, profile=True)
    (folder / "log.txt").write_text("\n".join(lines))
    return folder


def test_every_line_has_the_gauges(run: Path) -> None:
    records = [r for r in read_metrics(run) if "train/loss" in r]
    assert len(records) == STEPS
    flops = step_flops(small_config(Path(), 0).model, 32)
    for record in records:
        assert 0 <= record["train/data_wait"] <= 1
        assert record["train/tflops_per_rank"] == pytest.approx(record["train/images_per_second"] * flops / 1e12)
        assert 0.1 < record["train/memory_gib"] < 20
        assert record["train/bad_samples"] == 0
        assert 0.01 < record["train/grad_norm"] < 100
    assert "train/mfu" not in records[0] or torch.cuda.is_available()  # a CPU's peak isn't known
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("train/grad_norm")]
    assert logged == pytest.approx([record["train/grad_norm"] for record in records])


def test_flops_are_three_forward_passes() -> None:
    """Forward: every weight of a convolution or a linear layer is multiplied once for each of its output positions."""
    model = ConvNeur(ModelConfig("n1", num_classes=10, placement="none"))
    macs = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal macs
        macs += out.numel() // len(module.weight) * module.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 64, 64))
    assert macs > 1e6
    assert step_flops(model.config, 64) == pytest.approx(3 * 2 * macs, rel=1e-9)


def test_gates_are_those_of_the_first_batch(run: Path, digits: Path) -> None:
    record = next(r for r in read_metrics(run) if "eval/top1" in r)
    config = small_config(digits, 0)
    model = ConvNeur(config.model).eval()
    model.load_state_dict(load_file(list_checkpoints(run / "checkpoints")[0] / "model.safetensors"))
    batch = next(iter(EvalLoader(config.data, open_store(config.data, "val"), rank=0, world_size=1)))
    with torch.no_grad():
        x = model.stem(Normalize(config.data, torch.device("cpu"))(batch.images))
        for number, stage in enumerate(model.stages, 1):
            into = stage.downsample(x)
            gate = stage.blocks[0].global_branch(into.permute(0, 2, 3, 1)).sigmoid()
            assert record[f"gate/stage{number}_mean"] == pytest.approx(gate.mean().item(), abs=1e-5)
            assert record[f"gate/stage{number}_std"] == pytest.approx(gate.std().item(), rel=1e-3)
            assert record[f"gate/stage{number}_below_quarter"] == pytest.approx((gate < 0.25).float().mean().item())
            x = stage(x)


def test_a_profile_is_a_trace_and_a_table(run: Path) -> None:
    events = json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]
    assert {"aten::convolution_backward", "convneur::neural_memory"} <= {event.get("name") for event in events}
    log = (run / "log.txt").read_text()
    assert f"3 steps by CPU time, of rank 0; the trace is {run}/profile/trace.json" in log
    shares = re.findall(r"^ *([\d.]+)% +[\d.]+ +\d+  \S", log, re.MULTILINE)
    assert len(shares) == 15
    assert shares == sorted(shares, key=float, reverse=True)
    assert re.search(r"[\d.]+ GFLOPs to train on an image", log)


def test_curves_of_one_run_and_of_several(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "curve.png").unlink()
    assert main(["plot", str(run)]) == 0
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert main(["plot", str(run), str(other), "-o", str(tmp_path / "both.png")]) == 0
    assert capsys.readouterr().out.endswith(f"picture  {tmp_path}/both.png\n")
    assert (tmp_path / "both.png").read_bytes() != (run / "curve.png").read_bytes()
    assert main(["plot", str(tmp_path)]) == 2
    assert f"{tmp_path}/metrics.jsonl holds no metrics, expected the folder of a run" in capsys.readouterr().err


def test_weights_and_biases_only_if_installed() -> None:
    config = load_config(overrides=["--run.wandb_project", "mine"])
    with pytest.raises(InputError, match="'mine', but wandb isn't installed: pip install wandb, or leave it out"):
        check_config(config, world_size=1)


def test_a_resumed_run_keeps_the_damaged_file_beside_what_is_intact(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "epoch": step / 4, "train/loss": 1.0}).encode() for step in (1, 2, 3, 4)]
    damaged = b"\n".join([lines[0], b"\0" * 40, lines[2], b"5", lines[3][:9]])
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    records = Records(tmp_path, 3, "")
    assert [fault.partition(": ")[2].partition(" (")[0] for fault in records.faults] == [
        "line 2 is no record of metrics",
        "line 4 is no record of metrics",
    ]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    records.add(4, 1.0, {"eval/top1": 0.5})
    records.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3, 4]
    again = Records(tmp_path, 4, "")
    again.close()
    assert again.faults == []
