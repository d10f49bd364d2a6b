"""`convneur info`: the paper's totals, and the stages behind them."""

import json
import math

import pytest
import timm
import torch

from convneur.data.errors import InputError
from convneur.launch.cli import main
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.models.describe import count, describe

# M parameters and GMACs at 224: built, as derived from the paper's totals; and what the paper reports (rounded).
BUILT = {"m1": (4.311, 0.660), "m2": (6.103, 0.942), "m3": (10.618, 1.655), "m4": (18.048, 2.896)}
PAPER = {"m1": (4.3, 0.71), "m2": (6.1, 1.0), "m3": (10.6, 1.8), "m4": (18.1, 3.06)}
LARGER = {"m5": (32.12, 5.104), "m7": (94.87, 16.508), "m9": (375.29, 65.534)}


@pytest.mark.parametrize("variant", BUILT)
def test_totals_of_the_paper(variant: str) -> None:
    model = describe(ModelConfig(variant))
    params, gmacs = BUILT[variant]
    paper_params, paper_gmacs = PAPER[variant]
    assert model.params / 1e6 == pytest.approx(params, abs=5e-4)
    assert model.params / 1e6 == pytest.approx(paper_params, rel=5e-3)
    assert model.gmacs == pytest.approx(gmacs, abs=5e-4)
    assert model.gmacs <= paper_gmacs


@pytest.mark.parametrize("variant", LARGER)
def test_totals_of_larger_variants(variant: str) -> None:
    model = describe(ModelConfig(variant))
    assert (model.params / 1e6, model.gmacs) == pytest.approx(LARGER[variant], abs=5e-3)


@pytest.mark.parametrize(("placement", "params", "gmacs"), [("none", 9.046, 1.367), ("per_layer", 13.4, 2.111)])
def test_totals_of_other_placements(placement: str, params: float, gmacs: float) -> None:
    model = describe(ModelConfig("m3", placement=placement))
    assert model.params / 1e6 == pytest.approx(params, rel=5e-3)
    assert model.gmacs == pytest.approx(gmacs, abs=5e-3)


def test_stages_at_224() -> None:
    stages = describe(ModelConfig("m4")).stages
    assert [stage.resolution for stage in stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [stage.width for stage in stages] == [80, 160, 320, 640]
    assert [stage.blocks for stage in stages] == [2, 2, 8, 2]
    assert [stage.branches for stage in stages] == [1, 1, 1, 1]
    assert [stage.memory_width for stage in stages] == [40, 80, 160, 320]
    assert [stage.chunks for stage in stages] == [16, 4, 1, 1]


@pytest.mark.parametrize("size", [32, 33, 63, 97])
def test_stages_at_any_size_are_those_of_the_model(size: int) -> None:
    lengths = (50, 10, 10, 7)
    config = ModelConfig("n1", chunk_lengths=lengths, placement="per_layer")
    maps = ConvNeur(config).forward_intermediates(torch.zeros(1, 3, size, size), intermediates_only=True)
    for stage, length, feature_map in zip(describe(config, size).stages, lengths, maps, strict=True):
        assert stage.resolution == feature_map.shape[2:]
        assert stage.chunks == math.ceil(feature_map[0, 0].numel() / length)
        assert stage.branches == stage.blocks


def test_stages_without_branches_have_no_memory() -> None:
    for stage in describe(ModelConfig("n1", placement="none"), 64).stages:
        assert (stage.branches, stage.memory_width, stage.chunk_length, stage.chunks) == (0, None, None, None)


def test_parts_add_up_to_the_model() -> None:
    config = ModelConfig("n2", num_classes=7, in_chans=1)
    model, info = ConvNeur(config), describe(config, 64)
    assert info.params == sum(p.numel() for p in model.parameters())
    outside = sum(p.numel() for part in (model.stem, model.head) for p in part.parameters())
    assert info.params == outside + sum(stage.params for stage in info.stages)
    stem_and_head = (16 * 16 * 4 * 4 * 24 + 192 * 7) / 1e9
    assert info.gmacs == pytest.approx(stem_and_head + sum(stage.gmacs for stage in info.stages), abs=1e-12)


def test_nothing_is_allocated() -> None:
    state = torch.get_rng_state()
    describe(ModelConfig("m9"))  # 375 M parameters, 1.5 GB
    assert torch.equal(state, torch.get_rng_state())


def test_counts_a_backbone_of_timms() -> None:
    model = timm.create_model("resnet18").eval()
    macs, parts = count(model, torch.zeros(1, 3, 224, 224), [info["module"] for info in model.feature_info])
    assert [part.width for part in parts] == [64, 64, 128, 256, 512]
    assert [part.resolution[0] for part in parts] == [112, 56, 28, 14, 7]
    first_and_last = 112 * 112 * 7 * 7 * 3 * 64 + 512 * 1000
    assert macs == sum(part.macs for part in parts) + first_and_last == 1_814_073_344  # as others count it
    outside = sum(p.numel() for module in (model.conv1, model.bn1, model.fc) for p in module.parameters())
    assert sum(part.params for part in parts) + outside == sum(p.numel() for p in model.parameters())


def test_too_small_an_image_is_refused() -> None:
    with pytest.raises(InputError, match="image size is 31, expected at least 32 pixels"):
        describe(ModelConfig("n1"), 31)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "m1", "--json", "--image-size", "64", "--model.num_classes", "10"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert {"variant", "params", "gmacs", "stages"} <= info.keys()
    assert info["variant"] == "m1"
    assert info["params"] == describe(ModelConfig("m1", num_classes=10), 64).params
    assert {"resolution", "width", "blocks", "memory_width", "chunks"} <= info["stages"][0].keys()
    assert info["stages"][0]["resolution"] == [16, 16]


def test_table_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info", "m9"]) == 0
    output = capsys.readouterr().out
    assert "ConvNeur-M9: 375.286 M parameters, 65.534 GMACs at 224 x 224" in output
    assert "3 14x14 1024 27 1 512 196 1 234.919M 45.737" in " ".join(output.split())
    assert "…" not in output
