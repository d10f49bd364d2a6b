"""What counters that know modules or traces are told of ours, against PyTorch's counter, which sees every operation."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convneur.models.convneur import counters
from convneur.models.convneur.config import ModelConfig
from convneur.models.convneur.model import ConvNeur


def counted_by_modules(model: ConvNeur, images: torch.Tensor, rules: dict[Any, Any], total: str) -> tuple[int, int]:
    """Multiply-accumulates and parameters, as thop and ptflops add them up: by hooks on modules of known classes."""
    handles, counted = [], []
    for module in model.modules():
        if type(module) in rules:
            setattr(module, total, 0)
            handles.append(module.register_forward_hook(rules[type(module)]))
            counted.append(module)
    plain = [module for module in model.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    macs = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    handles += [module.register_forward_hook(count) for module in plain]
    model(images)
    for handle in handles:
        handle.remove()
    parameters = sum(p.numel() for module in (*counted, *plain) for p in module.parameters(recurse=False))
    return macs + sum(getattr(module, total) for module in counted), parameters


@torch.no_grad()
@pytest.mark.parametrize(("rules", "total"), [(counters.THOP, "total_ops"), (counters.PTFLOPS, "__flops__")])
def test_modules(rules: dict[Any, Any], total: str) -> None:
    model, images = ConvNeur(ModelConfig("n1")).eval(), torch.randn(2, 3, 96, 96)  # 576 tokens are written, 9 are not
    macs, parameters = counted_by_modules(model, images, rules, total)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert 2 * macs == counter.get_total_flops()
    assert parameters > 0.99 * sum(p.numel() for p in model.parameters())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_traced_operations() -> None:
    model, images = ConvNeur(ModelConfig("n1")).eval(), torch.randn(2, 3, 96, 96)
    graph, _ = torch.jit._get_trace_graph(model, (images,))  # as fvcore does: with the shapes of all values
    torch._C._jit_pass_inline(graph)
    nodes = [node for node in graph.nodes() if node.kind() in counters.FVCORE]
    macs = [counters.FVCORE[node.kind()](list(node.inputs()), list(node.outputs())) for node in nodes]
    with FlopCounterMode(display=False) as counter:
        model.train()(images)
    flops = counter.get_flop_counts()["Global"][torch.ops.convneur.neural_memory]
    assert len(macs) == 4  # a trace takes images of any size, so it has the memories that only read these
    assert 2 * macs[0] == flops


def test_a_stranger_is_refused() -> None:
    with pytest.raises(TypeError, match="LayerNorm is none of convneur's own"):
        counters.module_macs(nn.LayerNorm(4), torch.zeros(1, 4), torch.zeros(1, 4))
