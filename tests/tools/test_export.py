"""`convneur export`: each format from a checkpoint, read back by a program that knows nothing of this package."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_run import complete

import convneur.models.convneur.timm_names  # noqa: F401
from convneur.config import Config, RunConfig, config_text, load_config, save_config
from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.launch.cli import main
from convneur.models.convneur.config import VARIANTS, MemoryConfig, MixerKind, ModelConfig, Variant
from convneur.models.convneur.model import ConvNeur
from convneur.records.folder import CLASSES_FILE, CONFIG_FILE
from convneur.tools import export
from convneur.tools.export import export_checkpoint


@pytest.fixture(autouse=True)
def one_block_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes a second a block."""
    monkeypatch.setitem(VARIANTS, "n1", Variant((1, 1, 1, 1), 16))


def checkpoint(folder: Path, branch: MixerKind = "neural_memory", image_size: int = 96) -> tuple[Path, ConvNeur]:
    """What a checkpoint folder has of a model: configuration, raw and averaged weights. Returns the averaged one."""
    model = ModelConfig("n1", num_classes=5, branch=branch, memory=MemoryConfig(chunk_length=90), layer_scale=1.0)
    config = Config(run=RunConfig(name="small"), model=model, data=DataConfig(image_size=image_size))
    folder /= "step-00000001"
    folder.mkdir()
    torch.manual_seed(0)
    for name in ("model", "ema"):
        weights = ConvNeur(model).eval()
        save_file(weights.state_dict(), folder / f"{name}.safetensors", metadata={"config": config_text(config)})
    save_config(config, folder / CONFIG_FILE)
    (folder / CLASSES_FILE).write_text('["a", "b", "c", "d", "e"]')
    complete(folder)
    return folder, weights


def run_elsewhere(program: str, folder: Path) -> None:
    """Runs a program that must not import this package."""
    check = "\nimport sys; assert not [name for name in sys.modules if name.split('.')[0] == 'convneur']"
    subprocess.run([sys.executable, "-P", "-c", program + check], cwd=folder, check=True, timeout=1200)


def test_safetensors_for_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, averaged = checkpoint(tmp_path)
    assert main(["export", str(folder), "--format", "safetensors", "--ema"]) == 0
    assert capsys.readouterr().out == "small.safetensors: logits within 0.0e+00 of the checkpoint's\n"
    loaded = timm.create_model(
        "convneur_n1",
        num_classes=5,
        layer_scale=1.0,
        memory=MemoryConfig(chunk_length=90),
        checkpoint_path="small.safetensors",
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), averaged(x))
    with safe_open("small.safetensors", "pt") as file:
        assert file.metadata()["classes"] == '["a", "b", "c", "d", "e"]'


def test_onnx(tmp_path: Path) -> None:
    """From a model of images so small that its last stage is a single position."""
    folder, averaged = checkpoint(tmp_path, image_size=32)
    written = export_checkpoint(folder, "onnx", tmp_path / "model.onnx", averaged=True)
    assert written.any_size
    x = torch.randn(3, 3, 128, 160)
    torch.save((x, averaged(x).detach()), tmp_path / "case.pt")
    run_elsewhere(
        "import onnxruntime, torch\n"
        "session = onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])\n"
        "x, logits = torch.load('case.pt')\n"
        "torch.testing.assert_close(torch.from_numpy(session.run(['logits'], {'images': x.numpy()})[0]), logits)\n"
        "texts = session.get_modelmeta().custom_metadata_map\n"
        "assert 'chunk_length: 90' in texts['config'] and texts['classes'][:9] == '[\"a\", \"b\"'",
        tmp_path,
    )


def test_exported_program(tmp_path: Path) -> None:
    folder, averaged = checkpoint(tmp_path)
    written = export_checkpoint(folder, "torch", tmp_path / "model.pt2", averaged=True)
    assert written.any_size
    x = torch.randn(3, 3, 128, 160)
    torch.save((x, averaged(x).detach()), tmp_path / "case.pt")
    run_elsewhere(
        "import torch\n"
        "files = {'config.yaml': '', 'classes.json': ''}\n"
        "program = torch.export.load('model.pt2', extra_files=files)\n"
        "x, logits = torch.load('case.pt')\n"
        "torch.testing.assert_close(program.module()(x), logits)\n"
        "assert 'chunk_length: 90' in files['config.yaml'] and files['classes.json'][:9] == '[\"a\", \"b\"'",
        tmp_path,
    )


@pytest.mark.parametrize("branch", ["ir_rwkv", "titans"])
def test_other_branches(branch: MixerKind, tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, branch)
    assert export_checkpoint(folder, "torch", tmp_path / "model.pt2").any_size == (branch != "titans")


def test_images_too_small_for_a_program_of_open_size(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, image_size=32)
    assert not export_checkpoint(folder, "torch", tmp_path / "model.pt2").any_size


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = checkpoint(tmp_path)

    def perturb(model: ConvNeur, *args: object) -> export.Run:
        return lambda x: model(x) + 0.01

    monkeypatch.setattr(export, "_write_onnx", perturb)
    with pytest.raises(RuntimeError, match=r"the onnx file gives logits that differ from the checkpoint's by 0\.01"):
        export_checkpoint(folder, "onnx", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no checkpoint in {tmp_path}: expected a folder"):
        export_checkpoint(tmp_path, "onnx")
    folder, _ = checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"absent/model\.safetensors can't be written"):
        export_checkpoint(folder, "safetensors", tmp_path / "absent" / "model.safetensors")
    assert load_config([folder / CONFIG_FILE]).model.num_classes == 5


@pytest.mark.slow
def test_export_takes_memory_for_one_copy(tmp_path: Path) -> None:
    """Of the largest model, 1.5 GB; what a small one takes is taken off."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from convneur.tools.export import export_checkpoint\n"
        "export_checkpoint(Path(sys.argv[1]), 'safetensors', Path(sys.argv[1]) / 'out.safetensors')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    peaks, sizes = {}, {}
    for variant in ("m9", "n2"):
        with torch.device("meta"):
            model = ConvNeur(ModelConfig(variant, num_classes=5))
        config = Config(run=RunConfig(name=variant), model=model.config, data=DataConfig(image_size=32))
        folder = tmp_path / variant / "step-00000001"
        folder.mkdir(parents=True)
        weights = {name: 0.02 * torch.randn(weight.shape) for name, weight in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"config": config_text(config)})
        sizes[variant] = sum(weight.numel() * 4 for weight in weights.values())
        del weights
        save_config(config, folder / CONFIG_FILE)
        complete(folder)
        command = [sys.executable, "-P", "-c", program, str(folder)]
        peaks[variant] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert sizes["m9"] > 1e9
    assert peaks["m9"] - peaks["n2"] < 1.1 * sizes["m9"]
