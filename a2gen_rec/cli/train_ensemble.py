"""``a2gen train-ensemble``: one score from all that a run predicts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_device, build_parser, config_from_args, new_console
from a2gen_rec.config import EnsembleConfig

if TYPE_CHECKING:
    from a2gen_rec.ensemble.fit import TrainedEnsemble
    from a2gen_rec.ensemble.trainer import EpochResult
    from a2gen_rec.reporting.ensemble_curves import TransformCurves

NUM_PLOTTED_USERS = 4
"""Whose transforms are drawn."""
MIN_REPORTED_VIOLATION = 1e-6
"""A transform that falls by more is told of: float32, as served, rounds scores by about as much."""


def parser() -> ArgumentParser:
    command = build_parser(
        "Train the ensemble that makes one score of all a run predicts. Also under torchrun or TorchX.",
        usage="a2gen train-ensemble --run DIR [--out DIR] [--config FILE] [--SETTING VALUE ...]",
    )
    command.add_argument("--config", action="config", help="YAML of settings; later arguments override it")
    command.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint gives the predictions")
    command.add_argument("--out", type=str, default="", help="ensemble folder; by default `ensemble` in the run's")
    command.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    add_device(command)
    command.add_class_arguments(EnsembleConfig)
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.ensemble.fit import ENSEMBLE_DIR, train_ensemble
    from a2gen_rec.reporting.console.ensemble import list_metrics_tables
    from a2gen_rec.reporting.ensemble_curves import draw_transforms
    from a2gen_rec.utils import paths

    out = options.out or paths.join(options.run, ENSEMBLE_DIR)
    config = config_from_args(EnsembleConfig, options)
    trained = train_ensemble(options.run, out, config, _ConsoleProgress(), options.data, options.device)
    if trained is None:
        return
    console = new_console()
    for table in list_metrics_tables(trained.card.metrics):
        console.print(table)
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in trained.card.behaviours.items())
    console.print(f"behaviours' weights at the best epoch: {weights}", soft_wrap=True)
    for line in _monotonicity_warnings(trained.card.max_monotonicity_violation):
        console.print(line, soft_wrap=True)
    console.print(f"ensemble: {out}", soft_wrap=True)
    picture = paths.join(out, "transforms.png")
    draw_transforms(*_transform_curves(trained), picture)  # last: without it, the ensemble is there all the same
    console.print(f"learned transforms: {picture}", soft_wrap=True)


def _monotonicity_warnings(largest: Mapping[str, float]) -> list[str]:
    """A line per objective whose quadrature does not resolve its transform's rate of change."""
    return [
        f"the transform of {name} falls by up to {fall:.1e}: lower lr or raise degree"
        for name, fall in largest.items()
        if fall > MIN_REPORTED_VIOLATION
    ]


def _transform_curves(trained: "TrainedEnsemble") -> "tuple[list[TransformCurves], list[str]]":
    """What the ensemble makes of the predictions for some validation users, those with the longest histories."""
    import numpy as np

    from a2gen_rec.data.parquet_reader import user_ids_of_keys
    from a2gen_rec.reporting.ensemble_curves import transform_curves

    lists = trained.valid
    _, first = np.unique(lists.user, return_index=True)
    rows = first[np.argsort(-lists.events_length[first], kind="stable")][:NUM_PLOTTED_USERS]
    batch = lists.batch(rows)
    context = batch.context[:, :1]
    objectives = trained.card.objectives
    curves = transform_curves(trained.model, objectives, trained.train.predictions, batch.events, batch.length, context)
    names = user_ids_of_keys(trained.data, lists.user[rows])
    return curves, [f"user {name}" for name in names]


class _ConsoleProgress:
    """Progress, line by line, on the standard error stream of the first rank."""

    def __init__(self) -> None:
        import os

        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")

    def on_scoring(self, split: str, done: int, files: int) -> None:
        self._say(f"scoring {split}: {done} of {files} files")

    def on_fit_start(self, name: str) -> None:
        self._say(f"training {name}")

    def on_epoch_end(self, name: str, epoch: "EpochResult") -> None:
        metrics: Any = epoch.metrics
        self._say(f"{name}, epoch {epoch.epoch + 1}: loss {epoch.loss:.4f}, validation NDCG {metrics['ndcg']:.4f}")

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)
