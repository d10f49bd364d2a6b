"""The deepspeed section: what is filled in, what is refused, and that our list of keys is DeepSpeed's own."""

import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.runtime import config as deepspeed_source
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from convneur.config import deepspeed_config, load_config
from convneur.data.errors import InputError
from convneur.engine.section import BUCKET, KNOWN_KEYS, LOWER_PRECISION_MODULES, REFUSED_KEYS, parse_with_deepspeed
from convneur.models.convneur.config import MixerKind, ModelConfig
from convneur.models.convneur.mixers import MIXERS, UpdateGenerator
from convneur.models.convneur.model import ConvNeur

BASE = ["--data.global_batch_size", "96", "--train.accumulation", "2", "--optimizer.clip_grad", "0.5"]


def section(*overrides: str, world_size: int = 3) -> dict[str, Any]:
    return deepspeed_config(load_config(overrides=[*BASE, *overrides]), world_size)


def test_batch_sizes_accumulation_and_clipping_are_filled_in() -> None:
    filled = section("--deepspeed.zero_optimization.stage", "2", "--deepspeed.torch_autocast", "{enabled: true}")
    assert filled == {
        "train_batch_size": 96,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": BUCKET},
        "torch_autocast": {"enabled": True, "lower_precision_safe_modules": LOWER_PRECISION_MODULES},
        "timers": {"throughput": {"enabled": False}},
    }
    parse_with_deepspeed(filled)


@pytest.mark.parametrize("branch", MIXERS)
def test_all_of_the_models_layers_reduce_in_lower_precision(branch: MixerKind) -> None:
    """DeepSpeed compares classes, not instances: a layer of a class of our own would be left out in silence."""
    classes = {pkgutil.resolve_name(name) for name in LOWER_PRECISION_MODULES}
    layers = [m for m in ConvNeur(ModelConfig("n1", branch=branch)).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert {type(layer) for layer in layers if not isinstance(layer, UpdateGenerator)} <= classes


def test_the_configuration_stays_as_it_is() -> None:
    config = load_config(overrides=[*BASE, "--deepspeed.zero_optimization.stage", "1"])
    deepspeed_config(config, 3)["zero_optimization"]["stage"] = 2
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}


def test_agreeing_values_and_own_timers_are_kept() -> None:
    filled = section("--deepspeed.gradient_clipping", "0.5", "--deepspeed.timers", "{throughput: {synchronized: true}}")
    assert filled["timers"] == {"throughput": {"synchronized": True}}
    own = section("--deepspeed.zero_optimization.reduce_bucket_size", "1000")
    assert own["zero_optimization"]["reduce_bucket_size"] == 1000


class Watched(dict[str, Any]):
    """Notes which keys are asked for."""

    asked: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def test_known_keys_are_those_that_deepspeed_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "asked", set(), raising=False)
    DeepSpeedConfig(Watched(train_batch_size=1))
    Watched.asked.discard("sequence_parallel_size")  # asked of Megatron's configurations, where ranks have met already
    removed = set(deepspeed_source._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert "amp" in removed
    assert {*KNOWN_KEYS, *REFUSED_KEYS} - removed == Watched.asked - removed


REFUSED = {
    (
        "--deepspeed.zero_optimisation.stage",
        "1",
    ): "zero_optimisation is not a key of DeepSpeed; did you mean deepspeed.zero_opt",
    ("--deepspeed.sparse_attention", "{}"): "deepspeed.sparse_attention is not a key of DeepSpeed",
    (
        "--deepspeed.amp.enabled",
        "true",
    ): "DeepSpeed has dropped it; use deepspeed.torch_autocast",
    ("--deepspeed.optimizer.type", "Adam"): "deepspeed.optimizer can't be set: the optimizer section",
    ("--deepspeed.scheduler.type", "OneCycle"): "deepspeed.scheduler can't be set: the schedule section",
    ("--deepspeed.managed_gradient_accumulation", "false"): "can't be set: train.accumulation relies on",
    ("--deepspeed.train_batch_size", "3"): "deepspeed.train_batch_size is 3, but data.global_batch_size makes it 96",
    (
        "--deepspeed.train_micro_batch_size_per_gpu",
        "auto",
    ): "is 'auto', but data.global_batch_size on 3 ranks makes it 16",
    ("--deepspeed.gradient_accumulation_steps", "1"): "is 1, but train.accumulation makes it 2: leave it out",
    ("--deepspeed.gradient_clipping", "0"): "deepspeed.gradient_clipping is 0, but optimizer.clip_grad makes it 0.5",
    ("--deepspeed.zero_optimization", "true"): "deepspeed.zero_optimization is True, expected keys below it",
    (
        "--deepspeed.bf16.enabled",
        "true",
    ): "deepspeed.bf16 is enabled at ZeRO stage 0, where DeepSpeed is broken: use deep",
    (
        "--deepspeed.zero_optimization.offload_optimizer.device",
        "cpu",
    ): "deepspeed.zero_optimization.offload_optimizer is set at ZeRO stage 0, which keeps all of it on the device: use",
    ("--deepspeed.fp16", "{enabled: true}"): "deepspeed.fp16 is enabled at ZeRO stage 0, where DeepSpeed is broken",
    ("--deepspeed.bf16.check_grad_overflow", "false"): "bf16.check_grad_overflow is false, but a run skips steps",
    ("--deepspeed.zero_optimization.compute_grad_norm", "false"): "compute_grad_norm is false, but a run skips steps",
    (
        "--data.global_batch_size",
        "100",
    ): "data.global_batch_size is 100, expected a multiple of 6 (3 ranks x train.accum",
    ("--data.global_batch_size", "0"): "data.global_batch_size is 0, expected a multiple of 6",
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=str)
def test_what_cannot_work_is_refused_in_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        section(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_possible_above_stage_0(stage: int) -> None:
    words = ["--deepspeed.bf16.enabled", "true", "--deepspeed.zero_optimization.stage", str(stage)]
    filled = section(*words)
    assert filled["bf16"] == {"enabled": True}
    assert filled["data_types"] == {"grad_accum_dtype": "fp32"}  # what accumulates is not rounded
    assert section(*words, "--deepspeed.data_types.grad_accum_dtype", "bf16")["data_types"] == {
        "grad_accum_dtype": "bf16"
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA device")
def test_fp16_needs_cuda() -> None:
    with pytest.raises(InputError, match=r"deepspeed\.fp16 is enabled without a CUDA device"):
        section("--deepspeed.fp16.enabled", "true", "--deepspeed.zero_optimization.stage", "1")


REFUSED_BY_DEEPSPEED = {
    "zero_optimization: {stge: 1}": "deepspeed.zero_optimization.stge is not a key of DeepSpeed; did you mean deep"
    "speed.zero_optimization.stage?",
    "zero_optimization: {stage: 7}": "deepspeed.zero_optimization.stage is 7, which DeepSpeed refuses: ",
    "zero_optimization: {offload_param: {devise: cpu}}": "deepspeed.zero_optimization.offload_param.devise is 'cpu'",
    "communication_data_type: fp8": "DeepSpeed refuses the deepspeed section: Invalid communication_data_type.",
    "torch_autocast: {dtype: bf17}": "DeepSpeed refuses the deepspeed section: 'bf17' is not a valid DtypeEnum",
    "flops_profiler: 3": "DeepSpeed refuses the deepspeed section: ",
}


@pytest.mark.parametrize(("text", "message"), REFUSED_BY_DEEPSPEED.items(), ids=str)
def test_what_deepspeed_refuses_is_said_in_one_line(text: str, message: str) -> None:
    filled = section("--deepspeed", f"{{{text}}}")
    with pytest.raises(InputError) as caught:
        parse_with_deepspeed(filled)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
