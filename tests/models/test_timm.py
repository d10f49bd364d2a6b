"""ConvNeur as timm sees it: registry, head, features, parameter groups; what timm's own model tests ask, and more."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import set_layer_config
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters
from timm.optim import param_groups_layer_decay
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import convneur
from convneur.models.convneur.config import VARIANTS, ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.models.convneur.timm_names import VARIANT_NAMES

NAMES = [f"convneur_{variant}" for variant in VARIANTS]


def create(name: str = "convneur_n1", **kwargs: object) -> ConvNeur:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def images(size: int = 96, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def test_every_variant_is_registered() -> None:
    assert convneur.__name__ == "convneur"
    assert list(VARIANT_NAMES) == list(VARIANTS)
    assert set(NAMES) <= set(timm.list_models("convneur_*"))
    assert not timm.list_pretrained("convneur_*")


@pytest.mark.parametrize("program", ["import convneur, timm", "import convneur.models.convneur.model, timm"])
def test_importing_convneur_first_registers_too(program: str) -> None:
    """The second is the hard one: there the model module's own import of timm sets off the registration."""
    check = "assert 'convneur_m4' in timm.list_models('convneur_*')"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", f"{program}\n{check}"], check=True)


def test_importing_convneur_alone_loads_neither_timm_nor_torch() -> None:
    check = "import convneur, convneur.data, sys; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_cfg_fits_the_model(name: str) -> None:
    with FakeTensorMode():
        model = timm.create_model(name)
        cfg = model.pretrained_cfg
        assert model.forward_features(torch.empty(1, *cfg["input_size"])).shape[-2:] == cfg["pool_size"]
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["crop_pct"] == 0.875
    assert cfg["interpolation"] == "bicubic"
    keys = model.state_dict().keys()
    assert f"{cfg['first_conv']}.weight" in keys
    assert f"{cfg['classifier']}.weight" in keys
    assert model.num_classes == cfg["num_classes"] == 1000
    assert model.num_features == model.head_hidden_size == 8 * VARIANTS[name.removeprefix("convneur_")].base_width


def test_arguments_reach_the_configuration() -> None:
    model = create(num_classes=7, in_chans=1, global_pool="max", drop_rate=0.2, drop_path_rate=0.3, placement="none")
    assert model.config == ModelConfig(
        "n1", num_classes=7, in_chans=1, global_pool="max", drop_rate=0.2, drop_path=0.3, placement="none"
    )
    assert model.head.drop.p == 0.2
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    assert model(images(channels=1)).shape == (2, 7)


def test_head() -> None:
    """Pooling, norm and classifier can be taken off one by one, and every stage of that has the right shape."""
    model = create()
    x = images()
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 3, 3)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pre_logits), model(x))

    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pre_logits)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    assert create(num_classes=0, global_pool="")(x).shape == features.shape


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (2,), (-1,), (0, -2)])
@pytest.mark.parametrize("feature_cls", [None, "getter", "fx"])
def test_features_only(out_indices: tuple[int, ...], feature_cls: str | None) -> None:
    whole = create()
    pyramid = create(features_only=True, out_indices=out_indices, feature_cls=feature_cls)
    pyramid.load_state_dict(
        {new: whole.state_dict()[old] for new, old in zip(pyramid.state_dict(), _kept(whole, pyramid), strict=True)}
    )
    x = images()
    _, expected = whole.forward_intermediates(x, indices=list(out_indices))
    actual = pyramid(x)
    assert pyramid.feature_info.channels() == [f.shape[1] for f in actual]
    assert [96 // r for r in pyramid.feature_info.reduction()] == [f.shape[2] for f in actual]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def _kept(whole: torch.nn.Module, pyramid: torch.nn.Module) -> list[str]:
    """Names of the whole model's tensors that the pyramid keeps, in its order."""
    kept = len(pyramid.state_dict())
    return list(whole.state_dict())[:kept]


def test_forward_intermediates() -> None:
    model = create(layer_scale=1.0)
    x = images()
    final, stages = model.forward_intermediates(x)
    info = FeatureInfo(model.feature_info, 4)
    assert [s.shape[1] for s in stages] == info.channels() == [16, 32, 64, 128]
    assert [96 // s.shape[2] for s in stages] == info.reduction() == [4, 8, 16, 32]
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(final, stages[-1])
    early, two = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    torch.testing.assert_close(early, stages[1])
    assert len(two) == 2
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    torch.testing.assert_close(last, final)
    with pytest.raises(ValueError, match="output_fmt is 'NLC', expected 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_what_is_asked_for() -> None:
    model = create()
    x = images()
    _, expected = model.forward_intermediates(x)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.stages) == 3
    assert model.num_features == 64
    assert model.num_classes == 0
    _, actual = model.forward_intermediates(x, indices=[0, 2])
    torch.testing.assert_close(actual, [expected[0], expected[2]])
    assert not [name for name, _ in model.named_parameters() if name.startswith("head")]


def test_every_parameter_has_a_gradient_even_where_nothing_reads_the_update() -> None:
    """At 32 pixels every stage is a single chunk."""
    model = create(num_classes=42).train()
    model(images(32)).mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_grad_checkpointing_changes_no_bit() -> None:
    """Nor does the drop path: the recomputation draws the same blocks."""
    grads = []
    for enable in (False, True):
        model = create(drop_path_rate=0.5, num_classes=5, layer_scale=1.0).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_knows_every_parameter(coarse: bool) -> None:
    """Layers follow the depth: stem, downsampling and blocks stage by stage, head last."""
    model = create()
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    order = [groups[name] for name, _ in model.named_parameters()]
    assert order == sorted(order)
    assert max(order) == (5 if coarse else 13)


def test_layer_decay_leaves_vectors_and_persistent_tokens_undecayed() -> None:
    model = create(branch="titans")
    assert len(model.no_weight_decay()) == 4
    exempt = {
        id(p)
        for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.9)
        if group["weight_decay"] == 0
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        assert (id(p) in exempt) == (p.ndim < 2 or name.endswith("persistent_tokens"))
    assert create().no_weight_decay() == set()


def test_symbolic_tracing() -> None:
    model = create(layer_scale=1.0)
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    nodes = get_graph_node_names(model, tracer_kwargs=options)[1]
    traced = create_feature_extractor(model, [nodes[-1]], tracer_kwargs=options)
    x = images()
    torch.testing.assert_close(traced(x)[nodes[-1]], model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning")
def test_torchscript() -> None:
    with set_layer_config(scriptable=True):
        model = create(layer_scale=1.0)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images()), model(images()))
    expected = torch.autograd.grad(model(images()).square().sum(), list(model.parameters()))
    actual = torch.autograd.grad(scripted(images()).square().sum(), list(scripted.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_value_that_no_field_takes() -> None:
    with pytest.raises(ValueError, match=r"model\.global_pool is 'catavgmax', expected one of 'avg', "):
        create(global_pool="catavgmax")
    with pytest.raises(TypeError, match="img_size"):
        create(img_size=96)
