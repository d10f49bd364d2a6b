"""muP: what it leaves alone, what it does to weights and steps, and that activations then move alike at all widths."""

import runpy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from places import ROOT

from convneur.config import load_config
from convneur.data.errors import InputError
from convneur.engine.config import OptimizerConfig, ScheduleConfig
from convneur.engine.optimizer import build_optimizer, build_schedule
from convneur.limits import check_config
from convneur.models.convneur.config import MUP_INNER_LR, MemoryConfig, ModelConfig
from convneur.models.convneur.memory import NeuralMemory
from convneur.models.convneur.model import ConvNeur
from convneur.models.convneur.mup import MATRIX, RULES

SCRIPT = ROOT / "benchmarks" / "coordinate_check.py"
SHAPE = ModelConfig("16x1-1-2-1", num_classes=10)


def drawn(config: ModelConfig) -> ConvNeur:
    torch.manual_seed(0)
    return ConvNeur(config)


def optimizer_of(model: ConvNeur) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimizerConfig(), "torch", 64, offload=False)


def test_activations_move_alike_at_every_width_under_mup_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # where a script finds its neighbours
    script = runpy.run_path(str(SCRIPT))
    widths, slopes = (16, 32, 64), {}
    for mup in (False, True):
        moved = [script["changes"](width, mup, seed=0, steps=5, lr=1e-3) for width in widths]
        slopes[mup] = {kind: script["slope"](widths, [by_kind[kind] for by_kind in moved]) for kind in moved[0]}
    assert len(slopes[True]) == 10
    assert max(map(abs, slopes[True].values())) < 0.2, slopes[True]
    for kind in ("downsampling", "projection 4C to C", "bottleneck C to C/2", "logits"):
        assert slopes[False][kind] > 0.5, slopes[False]


@pytest.mark.parametrize("placement", ["per_layer", "none"])
def test_nothing_changes_at_the_base_width(placement: str) -> None:
    standard, mup = (drawn(replace(SHAPE, placement=placement, mup_base=base)) for base in ("", SHAPE.variant))
    for (name, one), (_, other) in zip(standard.named_parameters(), mup.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    names = [{p: name for name, p in model.named_parameters()} for model in (standard, mup)]
    groups = [optimizer_of(model).param_groups for model in (standard, mup)]
    for one, other in zip(*groups, strict=True):
        assert [names[0][p] for p in one["params"]] == [names[1][p] for p in other["params"]]
        assert other["lr_scale"] == 1
        assert all(one[key] == other[key] for key in ("lr", "weight_decay", "eps", "betas"))


@pytest.mark.parametrize("read", ["before_update", "after_update", "final_state"])
def test_one_inner_step_size_does_for_the_two_that_the_layers_want(read: str) -> None:
    """The memory with larger values, against one whose layers have step sizes of their own, by torch.func.grad."""
    m, dim, chunk, inner_lr = 4.0, 6, 5, 0.7
    torch.manual_seed(0)
    tokens, wq, wk, wv = (torch.randn(*shape).double() for shape in [(13, dim), *[(dim, dim)] * 3])
    bias, b = torch.randn(3 * dim).double(), torch.randn(3 * dim).double()
    generator = torch.randn(3 * dim, dim).double()
    w1, w2 = torch.randn(dim, 4 * dim).double(), torch.randn(4 * dim, dim).double() / 4

    def recall(w: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ w[0]) @ w[1]

    q, k, v = (tokens @ w.T + part for w, part in zip((wq, wk, wv), bias.chunk(3), strict=True))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    states, z = [(w1, w2)], [torch.zeros_like(w1), torch.zeros_like(w2)]
    for part in torch.arange(13).split(chunk):

        def error(w: tuple[torch.Tensor, torch.Tensor], part: torch.Tensor = part) -> torch.Tensor:
            return (recall(w, k[part]) - v[part]).square()

        theta, eta, alpha = (error(states[-1]).mean(0) @ generator.T + b).sigmoid().chunk(3)
        grads = torch.func.grad(lambda w, error=error: error(w).sum(-1).mean())(states[-1])
        z = [eta[:, None] * z[0] - inner_lr * theta[:, None] * grads[0], eta * z[1] - inner_lr / m * theta * grads[1]]
        states.append(((1 - alpha)[:, None] * states[-1][0] + z[0], (1 - alpha) * states[-1][1] + z[1]))
    read_from = {"before_update": states[:-1], "after_update": states[1:], "final_state": states[-1:] * 3}[read]
    expected = torch.cat([recall(w, part) for w, part in zip(read_from, q.split(chunk), strict=True)])

    memory = NeuralMemory(dim, MemoryConfig(chunk, inner_lr * m**MUP_INNER_LR, read)).double()
    larger = {name: m ** (RULES[f"memory.{name}"].lr - MATRIX.lr) for name in ("qkv_weight", "w2", "generator_weight")}
    with torch.no_grad():
        memory.qkv_weight.copy_(larger["qkv_weight"] * torch.cat([wq, wk, wv]))
        memory.qkv_bias.copy_(m ** RULES["memory.qkv_bias"].lr * bias)
        memory.w1.copy_(w1)
        memory.w2.copy_(larger["w2"] * w2)
        memory.generator_weight.copy_(larger["generator_weight"] * generator)
        memory.generator_bias.copy_(b)
        context = memory(tokens[None])[0]
    reader = m ** (RULES["global_branch.expand.weight"].lr - MATRIX.lr)
    torch.testing.assert_close(reader * context, expected)


def test_every_group_follows_the_schedule_and_forgets_alike() -> None:
    model = drawn(replace(SHAPE, mup_base="4x1-1-2-1"))
    optimizer = optimizer_of(model)
    schedule = build_schedule(optimizer, ScheduleConfig(epochs=2, warmup_epochs=1), 10)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {1, 1 / 4, 1 / 8, 1 / 16, 4**-0.5, 4**0.5}
    for step, lr in ((0, 1e-6), (10, 1e-3)):  # warmup_lr, and the peak
        schedule.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr * group["lr_scale"])
            assert group["lr"] * group["weight_decay"] == pytest.approx(lr * 0.05) or group["weight_decay"] == 0
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {p for p in model.parameters() if p.ndim > 1}
    assert len({p for group in optimizer.param_groups for p in group["params"]}) == len(list(model.parameters()))


@pytest.mark.parametrize("fusion", ["gate", "add", "concat"])
def test_every_matrix_has_a_rule(fusion: str) -> None:
    drawn(replace(SHAPE, fusion=fusion, placement="per_layer", mup_base="8x1-1-2-1"))  # KeyError otherwise


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.mup_base", "m10"], "model.mup_base is 'm10', expected one of 'n1', "),
        (["--model.mup_base", "n1", "--model.branch", "cbam"], "model.branch 'cbam', for which no scaling"),
        (["--model.mup_base", "n1", "--model.branch_widths", "[8, 8, 8, 8]"], "expected null: the widths"),
        (["--model.mup_base", "n1", "--optimizer.name", "lamb"], "'lamb' with model.mup_base 'n1', but muP is derived"),
    ],
)
def test_what_was_not_derived_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_config(load_config(overrides=words), 1)


def test_branches_that_are_not_there_need_no_rule() -> None:
    words = ["--model.mup_base", "n1", "--model.branch", "cbam", "--model.placement", "none"]
    assert load_config(overrides=words).model.width_factor == 5  # m4 has 80 channels


def test_other_depths_are_warned_of() -> None:
    assert ModelConfig("m3", mup_base="n1").depth_warning is None
    assert ModelConfig("m4").depth_warning is None
    warning = ModelConfig("m4", mup_base="m3").depth_warning
    assert warning is not None
    assert warning.startswith("2-2-8-2 blocks, model.mup_base m3 2-2-6-2: muP carries")
