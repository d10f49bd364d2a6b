"""Times the neural memory, forward and backward, against titans-pytorch and against slower versions of itself.

Runs alternate, and the figure to quote is the ratio of medians. Peak memory is what the allocator handed out at the
same time, above what was there before the call. The table that comes last is for docs/measurements.md. The default is
the first stage of a small ConvNeur at 224 x 224.

    python benchmarks/memory.py --out memory.json
    python benchmarks/memory.py --contenders convneur --sides 56 112 168 256 --batch-size 1   # cost a token
    python benchmarks/memory.py --device cuda --batch-size 256 --dim 40 --autocast

titans-pytorch is no requirement of ConvNeur: install 0.5.5 into an environment of its own, or into a folder with
`pip install --target FOLDER titans-pytorch==0.5.5`, and add that to PYTHONPATH; it is left out where it is missing.

contender        what it is
convneur         the module as it is used: on CPUs with its C++ kernel, on CUDA with its Triton kernels where they fit
fused            the operator without kernels of its own
plain            the equations in closed form, differentiated by autograd
naive            the inner gradient by torch.func.grad and vmap
titans           titans-pytorch's NeuralMemory with the memory MLP it comes with, which is the same; as in ConvNeur, a
                 chunk's gradient is taken at the weights that the chunk before left (batch_size = chunk_size)
titans_bare      without the norm and the skip connection that it puts around that MLP
titans_parallel  without them, and all gradients taken at the initial weights (batch_size = None), a cheaper algorithm
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from common import add_timing_flags, alternating_seconds, command_line, machine_in_words, row, write_results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from convneur.models.convneur.config import MemoryConfig
from convneur.models.convneur.memory import HIDDEN_RATIO, NeuralMemory
from convneur.ops.memory.equations import update_factors
from convneur.ops.memory.reading import steps


class NaiveMemory(NeuralMemory):
    """The paper's equations as one would type them in: the inner gradient by automatic differentiation."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        q, k, v = F.linear(tokens, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        images = tokens.shape[0]
        weights = tuple(w.expand(images, -1, -1) for w in (self.w1, self.w2))
        velocity = tuple(torch.zeros_like(w) for w in weights)

        def recall(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return F.gelu(x @ weights[0]) @ weights[1]

        def loss(weights: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
            return (recall(weights, k) - v).square().sum(-1).mean()

        context = []
        for keys, queries in steps(self.config.read, tokens.shape[1], self.config.chunk_length):
            context.append(recall(weights, q[:, queries]))
            if keys.stop:
                gradients = torch.func.vmap(torch.func.grad(loss))(weights, k[:, keys], v[:, keys])
                surprise = (recall(weights, k[:, keys]) - v[:, keys]).square().mean(1)
                factors = update_factors(surprise, self.generator_weight, self.generator_bias, self.config.inner_lr)
                by_axis = [[f[:, :, None] for f in factors], [f[:, None, :] for f in factors]]
                velocity = tuple(
                    eta * z - theta * g for z, g, (theta, eta, _) in zip(velocity, gradients, by_axis, strict=True)
                )
                weights = tuple(
                    (1 - alpha) * w + z for w, z, (*_, alpha) in zip(weights, velocity, by_axis, strict=True)
                )
        return torch.cat(context, dim=1)


class TitansMemory(nn.Module):
    """titans-pytorch's NeuralMemory around the same memory MLP: two layers, h = 4d, GELU."""

    def __init__(self, dim: int, chunk_length: int, sequential: bool, bare: bool) -> None:
        super().__init__()
        from titans_pytorch import MemoryMLP  # type: ignore[import-not-found]
        from titans_pytorch import NeuralMemory as Titans

        self.memory = Titans(
            dim,
            chunk_size=chunk_length,
            batch_size=chunk_length if sequential else None,
            model=MemoryMLP(dim, depth=2, expansion_factor=float(HIDDEN_RATIO)),
            mem_model_norm_add_residual=not bare,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        context: Tensor = self.memory(tokens)[0]
        return context


def ours(implementation: str, dim: int, chunk_length: int) -> nn.Module:
    """A ConvNeur memory with an implementation of its choice."""
    memory = NeuralMemory(dim, MemoryConfig(chunk_length))
    memory.implementation = implementation  # type: ignore[assignment]
    return memory


CONTENDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "convneur": partial(ours, "auto"),
    "fused": partial(ours, "fused"),
    "plain": partial(ours, "plain"),
    "naive": lambda dim, chunk_length: NaiveMemory(dim, MemoryConfig(chunk_length)),
    "titans": partial(TitansMemory, sequential=True, bare=False),
    "titans_bare": partial(TitansMemory, sequential=True, bare=True),
    "titans_parallel": partial(TitansMemory, sequential=False, bare=True),
}


def forward_and_backward(memory: nn.Module, tokens: Tensor, autocast: bool) -> Callable[[], None]:
    """One training pass, gradients of the tokens and of all parameters."""

    def step() -> None:
        x = tokens.detach().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, autocast):
            context = memory(x)
        context.float().sum().backward()
        memory.zero_grad()

    return step


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most memory in use at a time during one call, above what was in use before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    assert recording.profiler is not None
    events = recording.profiler.kineto_results.events()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in allocations), initial=0))


def compare(side: int, compiled: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all contenders in alternation on images of side x side tokens."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    tokens = torch.randn(args.batch_size, side * side, args.dim, device=device)
    passes = {}
    for name in args.contenders:
        try:
            memory = CONTENDERS[name](args.dim, args.chunk_length).to(device)
        except ImportError as error:
            print(f"{name} left out: {error}")
            continue
        if compiled:
            memory.compile()
        passes[name] = forward_and_backward(memory, tokens, args.autocast)
        for _ in range(args.warmup):
            passes[name]()
    times = alternating_seconds(passes, args.runs, device)
    medians = {name: statistics.median(t) for name, t in times.items()}
    results = []
    for name, step in passes.items():
        result = {
            "contender": name,
            "compiled": compiled,
            "side": side,
            "seconds": medians[name],
            "seconds_per_token": medians[name] / tokens[..., 0].numel(),
            "times_the_first": medians[name] / next(iter(medians.values())),
            "peak_bytes": peak_bytes(step, device),
            "all_seconds": times[name],
        }
        result["peak_bytes_per_token"] = result["peak_bytes"] / tokens[..., 0].numel()
        results.append(result)
        print(f"{side} x {side} {name}: {result['seconds'] * 1e3:.1f} ms", flush=True)
    return results


def main() -> None:
    """Runs all combinations asked for, prints the table and writes the JSON."""
    parser = command_line(__doc__)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--sides", type=int, nargs="+", default=[56], help="tokens along a side of the image")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--chunk-length", type=int, default=196)
    add_timing_flags(parser, modes=["eager"], batch_size=4, warmup=3, runs=15)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of titans-pytorch's dependencies

    print(machine_in_words(args.device))
    results = [r for mode in args.modes for side in args.sides for r in compare(side, mode == "compiled", args)]
    print("\n| contender | tokens | mode | time | over the first's | time a token | peak memory | a token |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for r in results:
        cells = [
            r["contender"],
            f"{r['side']} x {r['side']}",
            "compiled" if r["compiled"] else "eager",
            f"{r['seconds'] * 1e3:.1f} ms",
            f"{r['times_the_first']:.2f}",
            f"{r['seconds_per_token'] * 1e6:.2f} us",
            f"{r['peak_bytes'] / 2**20:.1f} MiB",
            f"{r['peak_bytes_per_token']:.0f} bytes",
        ]
        print(row(cells))
    write_results(args, results)


if __name__ == "__main__":
    main()
