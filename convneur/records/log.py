"""What a run says of itself while it trains: metrics.jsonl, TensorBoard events and lines in a terminal."""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from convneur.data.files import atomic_write
from convneur.monitoring.gauges import Gauges
from convneur.records.display import Display
from convneur.records.folder import DAMAGED_METRICS_FILE, EVENTS, METRICS_FILE
from convneur.records.json_files import json_text
from convneur.records.metrics import salvage_metrics
from convneur.system.world import World
from convneur.tasks.task import Scores


class TrainingLog:
    """Collects a run's metrics on all ranks; rank 0 writes and shows them.

    Losses stay on the device until a line is due, so logging doesn't stall the steps in between.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        every_steps: int,
        wandb_project: str = "",
    ) -> None:
        self.total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._images_per_step = images_per_step
        self._every_steps = every_steps
        self._loss_sum = torch.zeros(2, device=world.device)  # of the finite losses, and how many they are
        self._mark_step, self._mark_time = start_step, time.monotonic()
        self._records = Records(folder, start_step, wandb_project) if world.is_main else None
        self._display = Display(total_steps, start_step) if world.is_main else None
        for fault in self._records.faults if self._records else ():
            self.say(f"warning: {fault}: left out; the file as it was is {DAMAGED_METRICS_FILE}")

    @property
    def lacks_scores_at_start(self) -> bool:
        """Whether there are records of earlier starts, but none of an evaluation where this one goes on. Rank 0's."""
        return bool(self._records and self._records.lacks_scores)

    def step(self, done: int, loss: Tensor, learning_rate: float, gauges: Gauges) -> None:
        """Takes in the loss of step number `done - 1`; writes a line where one is due. Collective then.

        Losses that are not finite, which are the guards' business, are left out of the mean.
        """
        finite = loss.isfinite()
        self._loss_sum += torch.stack([torch.where(finite, loss, 0.0), finite])
        if self._display:
            self._display.advance(done)
        if done % self._every_steps and done < self.total_steps:
            return
        steps = done - self._mark_step
        dist.all_reduce(self._loss_sum)
        loss_sum, losses = self._loss_sum.tolist()
        now = time.monotonic()
        seconds = max(now - self._mark_time, 1e-9)
        rate = steps * self._images_per_step / seconds
        values = {
            "train/loss": loss_sum / losses if losses else math.nan,
            "train/lr": learning_rate,
            "train/images_per_second": rate,
            **gauges.read(seconds, rate),
        }
        self._loss_sum.zero_()
        self._mark_step, self._mark_time = done, now
        self._add(done, values)

    def scores(self, done: int, raw: Scores, averaged: Scores | None, gates: dict[str, float]) -> None:
        """Writes an evaluation after `done` steps, and the statistics of the gates in it."""
        values = {f"eval/{name}": value for name, value in raw.values.items()}
        if averaged:
            values |= {f"eval/{name}_ema": value for name, value in averaged.values.items()}
        self._add(done, values | gates)

    def say(self, line: str) -> None:
        """Shows a line on rank 0."""
        if self._display:
            self._display.say(line)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of a block out of images per second: it went into something else than training."""
        start = time.monotonic()
        yield
        self._mark_time += time.monotonic() - start

    def close(self) -> None:
        """Flushes and closes files and display."""
        if self._records and self._display:
            with self._alarmed():
                self._records.close()
            self._display.close()

    def _add(self, done: int, values: dict[str, float]) -> None:
        epoch = done / self._steps_per_epoch
        if self._records and self._display:
            with self._alarmed():
                self._records.add(done, epoch, values)
            self._display.show(done, epoch, values)

    @contextmanager
    def _alarmed(self) -> Iterator[None]:
        """A full disk is no reason to stop training."""
        try:
            yield
        except OSError as error:
            self.say(f"ALARM: metrics can't be written ({error})")


class Records:
    """metrics.jsonl and TensorBoard events, and Weights & Biases where it is asked for.

    Records of an earlier start are kept up to `step` and dropped after it: those steps are made anew. Where some of
    them are damaged, `faults` says which, and the file as it was is kept beside the new one. `lacks_scores` says
    whether some are kept, but none of an evaluation after `step` steps.
    """

    def __init__(self, folder: Path, step: int, wandb_project: str) -> None:
        records, self.faults = salvage_metrics(folder)
        if self.faults:
            shutil.copyfile(folder / METRICS_FILE, folder / DAMAGED_METRICS_FILE)
        kept = [record for record in records if record["step"] <= step]
        scored = [record["step"] for record in kept if any(name.startswith("eval/") for name in record)]
        self.lacks_scores = bool(kept) and step not in scored
        with atomic_write(folder / METRICS_FILE) as file:
            file.writelines(f"{json_text(record)}\n".encode() for record in kept)
        self._file = (folder / METRICS_FILE).open("a")
        from torch.utils.tensorboard import SummaryWriter  # takes a second to load, and only one rank writes

        self._events = SummaryWriter(str(folder / EVENTS), purge_step=step + 1)
        self._wandb = None
        if wandb_project:
            import wandb  # optional

            name = folder.resolve().name
            self._wandb = wandb.init(project=wandb_project, name=name, id=name, dir=str(folder), resume="allow")

    def add(self, done: int, epoch: float, values: dict[str, float]) -> None:
        """Records values, named like "train/loss", as they are after `done` optimizer steps."""
        self._file.write(json_text({"step": done, "epoch": epoch, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, done)
        if self._wandb:
            self._wandb.log({"epoch": epoch, **values}, step=done)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()
