"""Scoring of session lists with a trained ranker: the input of the ensemble (METHODS §6).

A user's targets of one session form the candidates of one request. All are predicted at the query time of the first
target, as in serving. Predicted at its own time, a candidate would depend on the user's actions on earlier candidates.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import EXIT, ITEM_ID
from a2gen_rec.ensemble.session_lists import SessionLists, concatenate, read_lists, write_lists
from a2gen_rec.errors import DataError
from a2gen_rec.evaluation.evaluate import evaluation_batches
from a2gen_rec.losses.targets import target_outcomes
from a2gen_rec.models.scoring import predict_targets, prediction_objectives, recent_events
from a2gen_rec.training.loaded_run import LoadedRun
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import all_gather_object, sync_errors

SCORES_FORMAT_VERSION = 4
"""Version of the cached scores; increment it when the same run and data give other scores."""


def behavior_names(card: DatasetCard) -> tuple[str, ...]:
    """Return the behaviors to train for: actions, labels and effective views, without negative actions."""
    kept = [*card.predicted_actions, *card.labels, *(name for name in card.objectives if name == "effective")]
    return tuple(name for name in kept if name not in card.negative_actions)


def score_session_lists(
    loaded: LoadedRun,
    split: str,
    folder: str,
    max_events: int,
    gap_s: float,
    progress: Callable[[int, int], None] | None = None,
) -> SessionLists | None:
    """Score the session lists of a split. Called by all ranks; rank 0 gets the lists, the others None.

    Scores are stored in ``folder``, one file per file of the split; existing files are reused.

    Args:
        loaded: Loaded run.
        split: Name of the split.
        folder: Directory of the scores.
        max_events: Maximum number of latest impressions before a list to store with it.
        gap_s: Maximum time between the starts of two impressions of a list, in seconds.
        progress: Called with the numbers of finished and of all files.

    Raises:
        UserError: The split has no windows, the directory cannot be written, or a file in it is corrupted.
    """
    files = loaded.dataset.files(split)
    with sync_errors():
        if not files:
            raise DataError(f"split {split!r} has no windows", file=loaded.dataset.split_dir(split))
        if loaded.process.is_main:
            paths.ensure_writable_dir(folder)
    scored_files = []
    for number, file in enumerate(files):
        if progress is not None:
            progress(number, len(files))
        scored = paths.join(folder, file.rsplit("/", 1)[-1])
        # Use the view of rank 0: ranks that disagree would deadlock.
        if not all_gather_object(paths.exists(scored))[0]:
            lists = _score_file(loaded, split, file, max_events, gap_s)
            with sync_errors():
                if loaded.process.is_main:
                    write_lists(scored, lists)
        scored_files.append(scored)
    if progress is not None:
        progress(len(files), len(files))
    with sync_errors():
        return read_lists(scored_files) if loaded.process.is_main else None


@torch.no_grad()
def _score_file(loaded: LoadedRun, split: str, file: str, max_events: int, gap_s: float) -> SessionLists:
    """Return the lists of one file from all ranks, sorted by user and time, independent of the number of ranks."""
    batches = evaluation_batches(loaded.dataset, split, loaded.config, loaded.process, request_gap_s=gap_s, file=file)
    loaded.model.model_parallel.eval()
    parts = [_score_batch(loaded, batch.to(loaded.process.device), max_events) for batch in batches]
    lists = concatenate([part for rank in all_gather_object(parts) for part in rank])
    return lists.select(np.lexsort((lists.ts_ms, lists.user)))


def _score_batch(loaded: LoadedRun, batch: WindowBatch, max_events: int) -> SessionLists:
    """Score the lists of one batch of requests."""
    card = loaded.card
    model = loaded.model.model
    predictions = predict_targets(
        model.embeddings(batch.sparse), model.ranker, batch, loaded.config.evaluate.max_unexplored_mass
    )
    query, length = torch.unique_consecutive(batch.query_index, return_counts=True)
    first = torch.cumsum(length, 0) - length
    events, events_length = recent_events(batch, first, max_events)
    occurred, _ = target_outcomes(batch, len(card.actions))
    outcome = {name: occurred[:, code] for code, name in enumerate(card.actions)}
    outcome |= dict(zip(card.labels, batch.labels.T, strict=True))
    outcome |= dict(zip(card.objectives, batch.objectives.T, strict=True))

    def to_numpy(values: Tensor, dtype: torch.dtype | None = None) -> np.ndarray:
        array: np.ndarray = (values if dtype is None else values.to(dtype)).cpu().numpy()
        return array

    behaviors = behavior_names(card)
    return SessionLists(
        objectives=tuple(objective.name for objective in prediction_objectives(card, model.ranker.objective_tasks)),
        behaviors=behaviors,
        user=to_numpy(batch.user_key[batch.target_window[first]]),
        ts_ms=to_numpy(batch.ts_ms[query]),
        length=to_numpy(length),
        events_length=to_numpy(events_length),
        item=to_numpy(batch.ids(ITEM_ID)[batch.target]),
        predictions=to_numpy(predictions.ensemble_inputs(EXIT in card.timed_actions)),
        label=to_numpy(torch.stack([outcome[name] for name in behaviors], 1), torch.float32),
        context=to_numpy(predictions.context, torch.float16),
        events=to_numpy(predictions.event_embedding[events], torch.float16),
    )
