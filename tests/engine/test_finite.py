"""Steps of ZeRO 0: the flag that stops them, and clipping."""

import pytest
import torch

from convneur.engine.build import build_engine
from convneur.engine.finite import stop_by
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.system.world import World


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_the_flag_stops_an_optimizer(implementation: str) -> None:
    """Of a fused one, by what its kernels read; the others are not called at all."""
    weight = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([weight], **{implementation: True})
    flag = torch.zeros(())
    stop_by(optimizer, flag)
    seen = []
    for up in (0.0, 1.0, 0.0):
        flag.fill_(up)
        weight.grad = torch.full((5,), float("nan") if up else 1.0)
        optimizer.step()
        state = optimizer.state[weight]
        seen.append([t.clone() for t in (weight.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert all(b.isfinite().all() and not torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_clipped_to_the_norm_that_torch_finds(world: World, dtype: str) -> None:
    """At ZeRO 0 the engine tells the norm and clips by it, also where float16 has the loss scaled."""
    model = ConvNeur(ModelConfig("n1", num_classes=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    section = {"train_batch_size": 4, "gradient_clipping": 0.1, "zero_optimization": {"stage": 0}}
    if dtype == "float16":
        section["torch_autocast"] = {"enabled": True, "dtype": dtype}
    engine = build_engine(model, optimizer, section)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    engine.backward(engine(images).float().square().mean())
    scaler = engine.deepspeed.torch_autocast_z0_gradscaler
    scale = scaler.get_scale() if scaler else 1.0
    gradients = {name: weight.grad / scale for name, weight in model.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    engine.step()

    norm = torch.nn.utils.get_total_norm(gradients.values())
    assert norm > 0.1
    torch.testing.assert_close(engine.gradient_norm(), norm)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name] - gradients[name] * 0.1 / norm)
