"""What is kept of a finished training run, to compare it by."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from a2gen_rec.config import Config
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import UserError
from a2gen_rec.models.factory import build_model
from a2gen_rec.training import checkpoint
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.training.trainer import is_finished
from a2gen_rec.utils import paths

THROUGHPUT_TAG = "speed/targets_per_s"


def summarize_run(folder: str, config: Config) -> dict[str, Any]:
    """The facts of the run in ``folder``: its best step, the validation there, its size and speed.

    Raises:
        UserError: it was stopped before its end, or has made no validation.
    """
    latest = RunDir(folder).latest_checkpoint()
    if latest is None:
        raise UserError(f"{folder}: no checkpoint was made")
    if not is_finished(checkpoint.TrainState.read(latest), config.train):
        raise UserError(f"{folder}: was stopped before its end")
    state = checkpoint.TrainState.read(checkpoint.best(folder))
    if not state.metrics:
        raise UserError(f"{folder}: made no validation")
    card = DatasetCard.from_dict(state.card, folder)
    return {
        "step": state.step,
        "validation": state.metrics,
        "parameters": count_parameters(card, config),
        "targets_per_s": read_throughput(folder),
    }


def count_parameters(card: DatasetCard, config: Config) -> dict[str, int]:
    """How many there are in the embedding ``tables`` and in the ``dense`` part."""
    model = build_model(card, config, torch.device("meta"))
    return {
        "tables": sum(p.numel() for p in model.embeddings.parameters()),
        "dense": sum(p.numel() for p in model.ranker.parameters()),
    }


def read_throughput(folder: str) -> float | None:
    """Median training speed over the intervals that were logged; None where none was."""
    logged = read_scalars(folder, [THROUGHPUT_TAG])[THROUGHPUT_TAG]
    return float(np.median([value for _, value in logged])) if logged else None


def read_scalars(folder: str, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """What the run in ``folder`` logged under ``names``: steps and values, none where it logged nothing."""
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    tensorboard = RunDir(folder).tensorboard
    if paths.exists(tensorboard):
        events = EventAccumulator(tensorboard, size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        for name in set(names) & set(events.Tags()["scalars"]):
            found[name] = [(event.step, float(event.value)) for event in events.Scalars(name)]
    return found
