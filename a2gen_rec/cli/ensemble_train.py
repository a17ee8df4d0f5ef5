"""``a2gen ensemble train``: train an ensemble of a run's predictions."""

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import (
    add_config_file,
    add_data,
    add_device,
    add_run,
    build_parser,
    config_from_args,
    is_main_rank,
    new_console,
)
from a2gen_rec.config import EnsembleConfig

if TYPE_CHECKING:
    from a2gen_rec.ensemble.fit import TrainedEnsemble
    from a2gen_rec.ensemble.trainer import EpochResult
    from a2gen_rec.reporting.ensemble_curves import TransformCurves

NUM_PLOTTED_USERS = 4
"""Number of users whose transforms are drawn."""
MIN_REPORTED_VIOLATION = 1e-6
"""Decrease of a transform above which a warning is printed; float32, as served, rounds scores by about as much."""


def parser() -> ArgumentParser:
    command = build_parser(
        "Train the ensemble that combines a run's predictions into one score. Also under torchrun or TorchX.",
        usage="a2gen ensemble train --run DIR [--out DIR] [--config FILE] [--SETTING VALUE ...]",
    )
    add_config_file(command)
    add_run(command, "used for predictions")
    command.add_argument(
        "--out", type=str, default="", help="output directory; default: `ensemble` in the run directory"
    )
    add_data(command)
    add_device(command)
    command.add_class_arguments(EnsembleConfig)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.ensemble.fit import train_ensemble
    from a2gen_rec.reporting.console.ensemble import list_metrics_tables
    from a2gen_rec.reporting.ensemble_curves import draw_transforms
    from a2gen_rec.training.run_dir import RunDir
    from a2gen_rec.utils import paths

    out = args.out or RunDir(args.run).ensemble
    config = config_from_args(EnsembleConfig, args)
    with _ConsoleProgress() as progress:
        trained = train_ensemble(args.run, out, config, progress, args.data, args.device)
    if trained is None:
        return
    console = new_console()
    for table in list_metrics_tables(trained.card.metrics):
        console.print(table)
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in trained.card.behavior_weights.items())
    console.print(f"behavior weights at the best epoch: {weights}", soft_wrap=True)
    for line in _monotonicity_warnings(trained.card.max_monotonicity_violation):
        console.print(line, soft_wrap=True)
    console.print(f"ensemble: {out}", soft_wrap=True)
    plot_file = paths.join(out, "transforms.png")
    draw_transforms(*_transform_curves(trained), plot_file)  # last: the ensemble is saved even if this fails
    console.print(f"learned transforms: {plot_file}", soft_wrap=True)


def _monotonicity_warnings(violations: Mapping[str, float]) -> list[str]:
    """Return one line per objective whose quadrature is too coarse for its transform's derivative."""
    return [
        f"the transform of {name} decreases by up to {violation:.1e}: decrease lr or increase quadrature_degree"
        for name, violation in violations.items()
        if violation > MIN_REPORTED_VIOLATION
    ]


def _transform_curves(trained: "TrainedEnsemble") -> "tuple[list[TransformCurves], list[str]]":
    """Return the transforms for the validation users with the longest histories, and the users' names."""
    import numpy as np

    from a2gen_rec.data.parquet_reader import read_user_ids
    from a2gen_rec.reporting.ensemble_curves import transform_curves

    lists = trained.valid
    _, first = np.unique(lists.user, return_index=True)
    rows = first[np.argsort(-lists.events_length[first], kind="stable")][:NUM_PLOTTED_USERS]
    batch = lists.batch(rows)
    context = batch.context[:, :1]
    objectives = trained.card.objectives
    curves = transform_curves(trained.model, objectives, trained.train.predictions, batch.events, batch.length, context)
    names = read_user_ids(trained.dataset, lists.user[rows])
    return curves, [f"user {name}" for name in names]


class _ConsoleProgress:
    """Progress on the standard error stream of rank 0: a bar while scoring, on a terminal, and lines."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.console = Console(stderr=True, highlight=False, quiet=not is_main_rank())
        is_hidden = self.console.quiet or not self.console.is_terminal
        self.bars = Progress(console=self.console, transient=True, disable=is_hidden)

    def __enter__(self) -> "_ConsoleProgress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def on_scoring(self, split: str, done: int, files: int) -> None:
        if not self.bars.task_ids:
            self.bars.start()
            self.bars.add_task(f"scoring {split}", total=files)
        self.bars.update(self.bars.task_ids[0], completed=done)
        if done == files:
            self.bars.stop()
            self.bars.remove_task(self.bars.task_ids[0])
            self._print(f"scored {split}: {files} {'file' if files == 1 else 'files'}")

    def on_fit_start(self, name: str) -> None:
        self._print(f"training {name}")

    def on_epoch_end(self, name: str, epoch: "EpochResult") -> None:
        metrics: Any = epoch.metrics
        self._print(f"{name}, epoch {epoch.epoch + 1}: loss {epoch.loss:.4f}, validation NDCG {metrics['ndcg']:.4f}")

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)
