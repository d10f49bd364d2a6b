"""`convneur explain`: the gates and surprises it shows are the model's, and it draws them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from small_run import complete

from convneur.config import Config, save_config
from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.launch.cli import main
from convneur.models.convneur.config import MemoryConfig, ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.records.folder import CONFIG_FILE
from convneur.tools.explain import GateView, draw, explain, look


def build(**settings: object) -> ConvNeur:
    torch.manual_seed(0)
    memory = MemoryConfig(chunk_length=50)
    return ConvNeur(ModelConfig("n1", num_classes=5, memory=memory, layer_scale=1.0, **settings)).eval()


def checkpoint(folder: Path, model: ConvNeur) -> Path:
    folder /= "step-00000001"
    folder.mkdir()
    for name in ("model", "ema"):
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    save_config(Config(model=model.config, data=DataConfig(image_size=64)), folder / CONFIG_FILE)
    complete(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "china.png"
    Image.fromarray(load_sample_image("china.jpg")).save(path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("placement", ["per_stage", "per_layer"])
def test_gates_are_those_of_each_stages_first_block(placement: str) -> None:
    model = build(placement=placement)
    image = torch.randn(1, 3, 64, 96)
    logits, views = look(model, image)
    torch.testing.assert_close(logits, model(image))
    x = model.stem(image)
    for stage, view in zip(model.stages, views, strict=True):
        x = stage.downsample(x)
        block = stage.blocks[0]
        gate = block.global_branch(x.permute(0, 2, 3, 1)).sigmoid()
        torch.testing.assert_close(view.gate, gate[0])
        with_gate = x + block.gamma[:, None, None] * (gate * block.local_branch(x)).permute(0, 3, 1, 2)
        torch.testing.assert_close(block(x), with_gate)
        x = stage.blocks(x)
    assert not [module for module in model.modules() if module._forward_hooks]


@torch.no_grad()
def test_surprise_is_the_error_of_recall_before_each_chunk_is_written() -> None:
    model = build()
    image = torch.randn(1, 3, 64, 96)
    _, views = look(model, image)
    assert [len(view.surprise) for view in views] == [8, 2, 1, 1]  # 384, 96, 24 and 6 tokens in chunks of 50

    branch = model.stages[0].blocks[0].global_branch
    tokens = branch.norm(branch.reduce(model.stem(image).permute(0, 2, 3, 1))).flatten(1, 2)[0]
    memory = branch.mixer.memory
    _, k, v = (tokens @ memory.qkv_weight.T + memory.qkv_bias).split(memory.dim, dim=-1)
    k = F.normalize(k, dim=-1)
    weights, velocity = (memory.w1, memory.w2), (torch.zeros(()), torch.zeros(()))

    def errors(w1: torch.Tensor, w2: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return (F.gelu(keys @ w1) @ w2 - values).square()

    for t, (k_t, v_t) in enumerate(zip(k.split(50), v.split(50), strict=True)):
        error = errors(*weights, k_t, v_t)
        torch.testing.assert_close(views[0].surprise[t], error.mean())
        gradient = torch.func.grad(lambda w, k=k_t, v=v_t: errors(*w, k, v).sum() / len(k))(weights)
        factors = memory.generator_weight @ error.mean(0) + memory.generator_bias
        theta, eta, alpha = (f[:, None] for f in factors.sigmoid().split(memory.dim))
        velocity = (eta * velocity[0] - theta * gradient[0], eta.T * velocity[1] - theta.T * gradient[1])
        weights = ((1 - alpha) * weights[0] + velocity[0], (1 - alpha).T * weights[1] + velocity[1])


def test_chunks_lie_in_raster_order() -> None:
    view = GateView(torch.rand(3, 4, 2), torch.tensor([1.0, 2.0, 3.0]), chunk_length=5)
    assert view.surprise_map.tolist() == [[1, 1, 1, 1], [1, 2, 2, 2], [2, 2, 3, 3]]
    assert view.map.shape == (3, 4)


def test_the_command_draws_a_picture(
    tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path, build())
    monkeypatch.chdir(tmp_path)
    assert main(["explain", str(folder), str(photo), "-o", "gates.png"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["1", "2", "3", "4"]
    assert rows[-1] == ["picture", "gates.png"]
    with Image.open("gates.png") as picture:
        assert picture.size == (2000, 1240)
        assert len(set(picture.convert("L").tobytes())) > 100


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_branch_without_a_memory(suffix: str, tmp_path: Path, photo: Path) -> None:
    explanation = explain(checkpoint(tmp_path, build(branch="cbam")), photo)
    assert [view.surprise for view in explanation.stages] == [None] * 4
    assert explanation.pixels.shape == (64, 64, 3)
    assert explanation.probabilities.sum().item() == pytest.approx(1.0)
    draw(explanation, tmp_path / f"gates.{suffix}")
    assert (tmp_path / f"gates.{suffix}").stat().st_size > 5000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "add"}, "has model.fusion = add, so there are no gates to look at"),
        ({"placement": "none"}, "has model.placement = none, so there are no gates to look at"),
    ],
)
def test_a_model_without_gates(settings: dict[str, str], message: str, tmp_path: Path, photo: Path) -> None:
    with pytest.raises(InputError, match=message):
        explain(checkpoint(tmp_path, build(**settings)), photo)


def test_bad_files(tmp_path: Path, photo: Path) -> None:
    folder = checkpoint(tmp_path, build())
    with pytest.raises(InputError, match=r"absent\.png can't be read \(No such file or directory\)"):
        explain(folder, tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png can't be read \(no known image format\), expected an image"):
        explain(folder, tmp_path / "text.png")
    explanation = explain(folder, photo)
    for name, reason in (("absent/gates.png", "No such file or directory"), ("gates.xyz", "is not supported")):
        with pytest.raises(InputError, match=rf"{name} can't be written \(.*{reason}"):
            draw(explanation, tmp_path / name)
    assert not list(tmp_path.glob("*gates*"))
