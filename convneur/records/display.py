"""Progress of a run in a terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Progress of a run: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._total_steps = total_steps
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:  # which can't move its cursor
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, rate="")
            self._bar.start()
        self._start = (start_step, time.monotonic())

    def advance(self, done: int) -> None:
        """Moves the bar."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def show(self, done: int, epoch: float, values: dict[str, float]) -> None:
        """Prints a line of metrics."""
        parts = [f"epoch {epoch:.2f}", f"step {done}/{self._total_steps}"]
        if "train/loss" in values:
            rate = f"{values['train/images_per_second']:,.0f} images/s"
            if self._bar:
                self._bar.update(self._task, rate=rate)
                return
            parts += [f"loss {values['train/loss']:.4f}", f"lr {values['train/lr']:.2e}", rate, self._time_left(done)]
        else:
            parts += [f"{name.removeprefix('eval/')} {v:.4f}" for name, v in values.items() if name.startswith("eval/")]
        self.say("  ".join(parts))

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(line, markup=False)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar:
            self._bar.stop()

    def _time_left(self, done: int) -> str:
        start_step, start_time = self._start
        seconds = (time.monotonic() - start_time) / max(done - start_step, 1) * (self._total_steps - done)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left"
