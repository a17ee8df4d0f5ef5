"""Summary of a finished training run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from a2gen_rec.config import Config
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import UserError
from a2gen_rec.gbdt.files import read_record
from a2gen_rec.models.factory import build_model
from a2gen_rec.training import checkpoint
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.trainer import is_finished
from a2gen_rec.utils import paths

THROUGHPUT_TAG = "speed/targets_per_s"
"""TensorBoard tag of the training speed."""


def summarize_run(folder: str, config: Config) -> dict[str, Any]:
    """Return best step, its validation metrics, number of parameters and training speed of a run.

    A run of ``model.name gbdt`` has its number of trees as step, no speed, and the ``importance`` of its columns.

    Args:
        folder: Run directory.
        config: Resolved configuration.

    Raises:
        UserError: There is no checkpoint, training did not finish, or there are no validation results.
    """
    if config.model.name == "gbdt":
        return _summarize_gbdt(folder)
    latest = RunDir(folder).latest_checkpoint()
    if latest is None:
        raise UserError(f"{folder}: no checkpoint found")
    if not is_finished(checkpoint.TrainState.read(latest), config.train):
        raise UserError(f"{folder}: training did not finish")
    state = checkpoint.TrainState.read(checkpoint.best(folder))
    if not state.metrics:
        raise UserError(f"{folder}: no validation results")
    card = state.dataset_card(folder)
    return {
        "step": state.step,
        "validation": state.metrics,
        "parameters": count_parameters(card, config),
        "targets_per_s": read_throughput(folder),
    }


def _summarize_gbdt(folder: str) -> dict[str, Any]:
    if not paths.exists(RunDir(folder).gbdt_file):
        raise UserError(f"{folder}: training did not finish")
    record = read_record(folder)
    return {
        "step": record.trees,
        "validation": record.metrics,
        "parameters": {"tables": 0, "dense": record.num_parameters},
        "targets_per_s": None,
        "importance": record.importance,
    }


def count_parameters(card: DatasetCard, config: Config) -> dict[str, int]:
    """Return the number of parameters of the embedding ``tables`` and of the ``dense`` model."""
    model = build_model(card, config, torch.device("meta"))
    return {
        "tables": sum(p.numel() for p in model.embeddings.parameters()),
        "dense": sum(p.numel() for p in model.ranker.parameters()),
    }


def read_throughput(folder: str) -> float | None:
    """Return the median training speed over logged intervals; None if nothing was logged."""
    logged = read_scalars(folder, [THROUGHPUT_TAG])[THROUGHPUT_TAG]
    return float(np.median([value for _, value in logged])) if logged else None


def read_scalars(folder: str, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) pairs of TensorBoard scalars of the run in ``folder``; empty lists for missing tags."""
    scalars: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    tensorboard = RunDir(folder).tensorboard
    if paths.exists(tensorboard):
        events = EventAccumulator(tensorboard, size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        for name in set(names) & set(events.Tags()["scalars"]):
            scalars[name] = [(event.step, float(event.value)) for event in events.Scalars(name)]
    return scalars
