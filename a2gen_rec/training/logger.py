"""What a running job tells: a live line on a terminal, plain lines elsewhere, TensorBoard scalars. Rank 0 alone."""

import time
from collections.abc import Mapping
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from a2gen_rec.data.batch import COUNT_NAMES
from a2gen_rec.utils import paths

_QUIET_SECONDS = 10.0


class TrainingLogger:
    """Collects what steps did and shows it.

    Args:
        leads: whether this rank talks; the others only collect their share of the loss.
        windows: training windows of one epoch.
        first_step: step a resumed run starts at.
        what: said before it begins.
    """

    def __init__(self, run: str, is_main: bool, epochs: int, windows: int, first_step: int, prefix: str = "") -> None:
        self.run, self.leads, self.epochs, self.windows = run, is_main, epochs, windows
        self.first_step, self.steps, self.seen, self.what = first_step, first_step, 0, prefix
        self.console = Console(stderr=True, quiet=not is_main, highlight=False)
        self.bar: Bar | None = None
        self.writer: SummaryWriter | None = None
        self.loss = float("nan")
        self.last_line = 0.0
        self.sums: Tensor
        self.counts: Tensor
        self._reset()

    def __enter__(self) -> "TrainingLogger":
        if self.leads:
            if paths.is_local(self.run):
                self.writer = SummaryWriter(paths.join(self.run, "tensorboard"), purge_step=self.first_step + 1)
            if self.console.is_terminal:
                self.bar = Bar(
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TimeRemainingColumn(),
                    console=self.console,
                )
                self.task = self.bar.add_task("starting", total=self.epochs * self.windows)
                self.bar.start()
            where = f"resuming at step {self.first_step}" if self.first_step else "training"
            self.info(f"{self.what}{where}: {self.epochs} epochs of {self.windows:,} windows")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def step(self, sums: Tensor, counts: Tensor, windows: int, seconds: float, wait_s: float) -> None:
        """Note a step: this rank's loss sums, the global counts and windows, its time and its wait for data."""
        self.steps += 1
        self.sums = torch.add(self.sums, sums.double())  # stays where it is: a copy to the host would wait for the step
        self.counts = self.counts + counts.cpu()
        self.seconds += seconds
        self.waited += wait_s
        self.seen += windows
        if self.bar is not None:
            self.bar.update(self.task, advance=windows, description=self._line())

    def pop_means(self) -> tuple[Tensor, Tensor]:
        """Loss sums of this rank and global counts since the last log."""
        return self.sums.cpu().clone(), self.counts.clone()

    def log(self, step: int, scalars: Mapping[str, float], rate: float) -> None:
        """Write scalars of the interval since the last log, and begin the next."""
        self.loss = scalars["loss"]
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(f"train/{name}", value, step)
            self.writer.add_scalar("train/learning_rate_scale", rate, step)
            self.writer.add_scalar("speed/targets_per_s", self._targets_per_s(), step)
            self.writer.add_scalar("speed/data_wait_share", self.waited / max(self.seconds, 1e-9), step)
        if self.bar is None and time.monotonic() - self.last_line > _QUIET_SECONDS:
            self.last_line = time.monotonic()
            self.info(self._line())
        self._reset()

    def log_validation(self, metrics: Mapping[str, float], step: int, is_best: bool) -> None:
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(f"valid/{name}", value, step)
        mark = " (best so far)" if is_best else ""
        self.info(f"step {step}: validation loss {metrics['loss']:.4f}, mean AUC {metrics['auc']:.4f}{mark}")

    def info(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def _line(self) -> str:
        return (
            f"step {self.steps} · {self._targets_per_s():,.0f} targets/s · loss {self.loss:.4f} · "
            f"data wait {self.waited / max(self.seconds, 1e-9):.0%}"
        )

    def _targets_per_s(self) -> float:
        targets = self.counts[COUNT_NAMES.index("targets")] if self.counts.ndim else 0.0
        return float(targets) / max(self.seconds, 1e-9)

    def _reset(self) -> None:
        # Zeros that take the shape and device of what is added.
        self.sums, self.counts = torch.zeros(2, dtype=torch.float64)
        self.seconds: float = 0.0
        self.waited: float = 0.0
