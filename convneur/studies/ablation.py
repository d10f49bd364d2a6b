"""The ablation table: every system that the paper compares, trained by one recipe, beside what the paper reports.

A run is an ordinary run, in `root/name/ROW-seedN`; whichever are missing or unfinished are trained, one after the
other, and the table is made from their summaries. So it goes on where it stopped, and several machines that share a
file system can take different rows. It is about ConvNeur's parts, and about classification.
"""

import csv
import io
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from convneur.config import Config
from convneur.data.errors import DamagedError
from convneur.data.files import atomic_write
from convneur.models.build import build_model
from convneur.models.convneur.config import ModelConfig, variant_named
from convneur.models.describe import describe
from convneur.records.json_files import json_text
from convneur.records.summary import read_summary
from convneur.studies.series import check_task, member, member_folder, standing
from convneur.system.world import World

WARM_UP_ROUNDS, LATENCY_ROUNDS = 2, 9


@dataclass(frozen=True)
class Row:
    """A system of the table.

    Attributes:
        model: fields of the model's configuration that it changes.
        paper_gmacs: its billions of multiply-accumulates as ConvNeur-M3 at 224 x 224, as the paper rounds them; None
            where the paper has no such row.
        paper_top1: its accuracy on ImageNet-1k as the paper has it, in percent.
    """

    model: dict[str, Any]
    paper_gmacs: float | None = None
    paper_top1: float | None = None

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """The model of this row, given the one that all rows vary."""
        memory = replace(config.memory, **self.model.get("memory", {}))
        return replace(config, **{**self.model, "memory": memory})


ROWS = {
    "local_only": Row({"placement": "none"}, 1.4, 78.2),
    "neural_memory": Row({}, 1.8, 80.0),
    "per_layer": Row({"placement": "per_layer"}, 2.3, 80.4),
    "cbam": Row({"branch": "cbam"}, 1.5, 78.4),
    "non_local": Row({"branch": "non_local"}, 3.0, 79.1),
    "self_attention": Row({"branch": "self_attention"}, 1.8, 79.8),
    "ir_rwkv": Row({"branch": "ir_rwkv"}, 2.0, 77.6),
    "titans": Row({"branch": "titans"}, 3.1, 79.6),
    "add": Row({"fusion": "add"}, 1.8, 79.6),
    "concat": Row({"fusion": "concat"}, 1.9, 79.5),
    "after_update": Row({"memory": {"read": "after_update"}}),
    "final_state": Row({"memory": {"read": "final_state"}}),
}
"""`neural_memory` is the paper's default, which all other rows differ from in one thing."""


@dataclass(frozen=True)
class AblationSettings:
    """What is compared.

    Attributes:
        rows: rows of the table, of those in `convneur.studies.ablation.ROWS`.
        seeds: every row is trained once with each of them.
    """

    rows: list[str] = field(default_factory=lambda: list(ROWS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        for row in self.rows:
            if row not in ROWS:
                raise ValueError(f"ablation.rows has {row!r}, expected names out of {', '.join(ROWS)}")
        for key, values in (("rows", self.rows), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"ablation.{key} is {values}, expected at least one, and none twice")


@dataclass(frozen=True)
class AblationConfig(Config):
    """The recipe that all rows share, and what is compared."""

    ablation: AblationSettings = field(default_factory=AblationSettings)

    def __post_init__(self) -> None:
        check_task(self)
        variant_named(self.model.variant)


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        row: its name.
        params: parameters.
        gmacs: billions of multiply-accumulates an image, of matrix products and convolutions.
        paper_gmacs: what the paper has for ConvNeur-M3 at 224 x 224.
        latency_ms: median time of one image's forward pass.
        top1: percent of held-out images classified rightly, of every seed that is trained.
        paper_top1: what the paper has for ConvNeur-M3 on ImageNet-1k, in percent.
    """

    row: str
    params: int
    gmacs: float
    paper_gmacs: float | None
    latency_ms: float
    top1: dict[int, float]
    paper_top1: float | None

    @property
    def top1_mean(self) -> float | None:
        """Mean over the seeds; None before there is one."""
        return statistics.mean(self.top1.values()) if self.top1 else None

    @property
    def top1_std(self) -> float | None:
        """Sample standard deviation over the seeds; None before there are two."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else None


def run_configs(config: AblationConfig) -> dict[tuple[str, int], Config]:
    """The configuration of every run, by row and seed; the seeds come round by round, so that all rows get one soon."""
    return {
        (row, seed): member(config, f"{row}-seed{seed}", seed, ROWS[row].applied_to(config.model))
        for seed in config.ablation.seeds
        for row in config.ablation.rows
    }


def train_rows(config: AblationConfig, world: World) -> None:
    """Trains what is not yet trained. Collective.

    Raises what `convneur.train.train` raises.
    """
    from convneur.train import train

    runs = run_configs(config)
    damaged = standing(runs, "ablation").damaged
    for number, ((row, seed), run) in enumerate(runs.items(), 1):
        if (row, seed) in damaged or read_summary(member_folder(run)):
            continue
        if world.is_main:
            print(f"[{number}/{len(runs)}] {row}, seed {seed}", flush=True)
        if train(run, world, member_folder(run), resume="auto") is None:
            return  # told to stop


def tabulate(config: AblationConfig, device: torch.device) -> list[Result]:
    """Costs of every row, its latency measured here and now, and the accuracies that are there and intact."""
    models = {row: ROWS[row].applied_to(config.model) for row in config.ablation.rows}
    latencies = measure_latencies(models, config.data.image_size, device)
    top1: dict[str, dict[int, float]] = {row: {} for row in models}
    for (row, seed), run in run_configs(config).items():
        with suppress(DamagedError):  # it isn't among the seeds of the table, then
            if summary := read_summary(member_folder(run)):
                top1[row][seed] = 100 * summary.chosen
    results = []
    for row, model in models.items():
        cost = describe(model, config.data.image_size)
        paper = ROWS[row]
        results.append(
            Result(row, cost.params, cost.gmacs, paper.paper_gmacs, latencies[row], top1[row], paper.paper_top1)
        )
    return results


@torch.inference_mode()
def measure_latencies(models: dict[str, ModelConfig], image_size: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of a forward pass of one image, float32; the models take turns, so drift hits all alike."""
    built = {name: build_model(config).to(device).eval() for name, config in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(WARM_UP_ROUNDS + LATENCY_ROUNDS):
        for name, model in built.items():
            image = torch.randn(1, models[name].in_chans, image_size, image_size, device=device)
            image = image.to(memory_format=torch.channels_last)
            _synchronize(device)
            start = time.perf_counter()
            model(image)
            _synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[WARM_UP_ROUNDS:]) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


COSTS = ("row", "params M", "GMACs", "paper GMACs", "ms/image")
HEADINGS = (*COSTS, "top-1 %", "paper top-1 %")


def cells(result: Result) -> tuple[str, ...]:
    """A line of the table as text, one cell a heading."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    spread = "" if result.top1_std is None else f" ± {result.top1_std:.2f}"
    return (
        result.row,
        f"{result.params / 1e6:.3f}",
        f"{result.gmacs:.3g}" if result.gmacs < 0.1 else f"{result.gmacs:.3f}",
        number(result.paper_gmacs, 1),
        f"{result.latency_ms:.2f}",
        number(result.top1_mean, 2) + spread,
        number(result.paper_top1, 1),
    )


def caption(config: AblationConfig, results: Sequence[Result], device: torch.device) -> str:
    """What the numbers are of, and where they were made."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    sentences = [
        f"ConvNeur-{config.model.variant.upper()} at {config.data.image_size} x {config.data.image_size}.",
        f"Latency: one image, float32, {hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "The paper's columns: ConvNeur-M3 at 224 x 224, ImageNet-1k.",
    ]
    if trained := max(len(result.top1) for result in results):
        averaged = "averaged " if config.train.ema_decay else ""
        sentences.insert(
            1,
            f"Top-1 of the {averaged}weights after {config.schedule.epochs} epochs on {config.data.root}, mean ±"
            f" standard deviation over {trained} of {len(config.ablation.seeds)} seeds.",
        )
    return " ".join(sentences)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def save_table(folder: Path, results: Sequence[Result], caption: str) -> list[Path]:
    """Writes table.json, table.csv and table.md into the folder."""
    table = [{**asdict(r), "top1_mean": r.top1_mean, "top1_std": r.top1_std} for r in results]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    flat = [{**line, "top1": " ".join(f"{top1:.4f}" for top1 in line["top1"].values())} for line in table]
    writer.writerow(flat[0])
    writer.writerows(line.values() for line in flat)
    rows = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *map(cells, results)]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{caption}\n"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.json": json_text({"caption": caption, "rows": table}, indent=2) + "\n",
        "table.csv": lines.getvalue(),
        "table.md": markdown,
    }
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    return [folder / name for name in texts]
