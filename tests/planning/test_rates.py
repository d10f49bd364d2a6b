"""What a core decodes in a second: measured, written down, and found again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from convneur.config import load_config
from convneur.data.config import DataConfig
from convneur.data.prepare.synthetic import prepare_synthetic
from convneur.launch.cli import main
from convneur.planning import rates
from convneur.planning.rates import PER_CORE, images_per_core, rates_file, record_rate


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_measurement_is_what_plan_reckons_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_synthetic(tmp_path / "data", classes=2, images=40, height=30, width=40, processes=1, shard_samples=20)
    words = ["bench", "data", str(tmp_path / "data"), "--images", "100", "--processes", "1", "--data.image_size", "32"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["images"] == 120  # whole batches
    assert measured["per_core"] == pytest.approx(120 / measured["processor_seconds"], rel=0.01)
    config = load_config([], ["--data.image_size", "32"])
    per_core, how = images_per_core(config.data)
    assert per_core == measured["per_core"]
    assert f"as measured on {rates.cpu_name()}" in how
    assert images_per_core(replace(config.data, image_size=64))[0] == PER_CORE[True]


def test_the_newest_on_such_a_processor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig()
    record_rate(data, 100)
    record_rate(data, 200)
    assert len(json.loads(rates_file().read_text())["rates"]) == 1
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(rates, "cpu_name", lambda: "another")
        assert images_per_core(data)[0] == 200  # rather than a guess
        record_rate(data, 300)
        assert images_per_core(data)[0] == 300
    assert images_per_core(data)[0] == 200


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rates": [1, {"per_core": 1}]}'])
def test_a_damaged_file_is_none(text: str) -> None:
    rates_file().parent.mkdir(parents=True)
    rates_file().write_text(text)
    assert "docs/data.md" in images_per_core(DataConfig())[1]
    record_rate(DataConfig(), 100)
    assert images_per_core(DataConfig())[0] == 100
