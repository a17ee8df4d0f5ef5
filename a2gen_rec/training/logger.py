"""Progress of training on rank 0: a live line on a terminal, plain lines elsewhere, and TensorBoard scalars."""

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
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths

_LINE_INTERVAL_S = 10.0


class TrainingLogger:
    """Accumulator and logger of training steps.

    Args:
        run: Run directory.
        is_main: Whether this rank logs; other ranks only accumulate their loss sums.
        epochs: Number of epochs.
        windows: Training windows of one epoch.
        first_step: First step of a resumed run.
        prefix: Text before the first line.
    """

    def __init__(self, run: str, is_main: bool, epochs: int, windows: int, first_step: int, prefix: str = "") -> None:
        self.run, self.is_main, self.epochs, self.windows = run, is_main, epochs, windows
        self.first_step, self.steps, self.num_windows, self.prefix = first_step, first_step, 0, prefix
        self.console = Console(stderr=True, quiet=not is_main, highlight=False)
        self.bar: Bar | None = None
        self.writer: SummaryWriter | None = None
        self.loss = float("nan")
        self.last_line = 0.0
        self.sums: Tensor
        self.counts: Tensor
        self._reset()

    def __enter__(self) -> "TrainingLogger":
        if self.is_main:
            if paths.is_local(self.run):
                self.writer = SummaryWriter(RunDir(self.run).tensorboard, purge_step=self.first_step + 1)
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
            start = f"resuming at step {self.first_step}" if self.first_step else "training"
            self.info(f"{self.prefix}{start}: {self.epochs} epochs of {self.windows:,} windows")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def step(self, sums: Tensor, counts: Tensor, windows: int, seconds: float, wait_s: float) -> None:
        """Add a step.

        Args:
            sums: Loss sums of this rank.
            counts: Global counts.
            windows: Windows of the step, over all ranks.
            seconds: Time of the step.
            wait_s: Time spent waiting for data.
        """
        self.steps += 1
        self.sums = torch.add(self.sums, sums.double())  # no copy to the host, which would wait for the step
        self.counts = self.counts + counts.cpu()
        self.seconds += seconds
        self.wait_s += wait_s
        self.num_windows += windows
        if self.bar is not None:
            self.bar.update(self.task, advance=windows, description=self._line())

    def interval_sums(self) -> tuple[Tensor, Tensor]:
        """Return loss sums of this rank and global counts since the last log."""
        return self.sums.cpu().clone(), self.counts.clone()

    def log(self, step: int, scalars: Mapping[str, float], lr_scale: float) -> None:
        """Write scalars of the interval since the last log and start the next interval."""
        self.loss = scalars["loss"]
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(f"train/{name}", value, step)
            self.writer.add_scalar("train/learning_rate_scale", lr_scale, step)
            self.writer.add_scalar("speed/targets_per_s", self._targets_per_s(), step)
            self.writer.add_scalar("speed/data_wait_share", self.wait_s / max(self.seconds, 1e-9), step)
        if self.bar is None and time.monotonic() - self.last_line > _LINE_INTERVAL_S:
            self.last_line = time.monotonic()
            self.info(self._line())
        self._reset()

    def log_validation(self, metrics: Mapping[str, float], step: int, is_best: bool) -> None:
        """Write validation metrics."""
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(f"valid/{name}", value, step)
        mark = " (best so far)" if is_best else ""
        mean_auc = f", mean AUC {metrics['auc']:.4f}" if "auc" in metrics else ""
        self.info(f"step {step}: validation loss {metrics['loss']:.4f}{mean_auc}{mark}")

    def info(self, line: str) -> None:
        """Print a line on rank 0."""
        self.console.print(line, soft_wrap=True)

    def _line(self) -> str:
        return (
            f"step {self.steps} · {self._targets_per_s():,.0f} targets/s · loss {self.loss:.4f} · "
            f"data wait {self.wait_s / max(self.seconds, 1e-9):.0%}"
        )

    def _targets_per_s(self) -> float:
        targets = self.counts[COUNT_NAMES.index("targets")] if self.counts.ndim else 0.0
        return float(targets) / max(self.seconds, 1e-9)

    def _reset(self) -> None:
        # Scalar zeros; the first addition sets shape and device.
        self.sums, self.counts = torch.zeros(2, dtype=torch.float64)
        self.seconds: float = 0.0
        self.wait_s: float = 0.0
