"""What a trained ranker predicts for session lists: the input of the ensemble (METHODS §6).

A user's targets of one session are taken as the candidates of one request and judged at its first moment, as they
would be when served: judged each at its own, a candidate would know what the user did with those before it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import EXIT, ITEM_ID, DatasetCard
from a2gen_rec.ensemble.session_lists import SessionLists, concatenate, read_lists, write_lists
from a2gen_rec.errors import DataError
from a2gen_rec.evaluation.evaluate import evaluation_batches
from a2gen_rec.losses.targets import target_outcomes
from a2gen_rec.models.scoring import predict_targets, prediction_objectives, recent_events
from a2gen_rec.training.loaded_run import LoadedRun
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import all_gather_object, sync_errors

SCORES_FORMAT_VERSION = 4
"""Of what score files hold: raised whenever the same run and data would give others."""


def behavior_names(card: DatasetCard) -> tuple[str, ...]:
    """What users may do that is worth ranking for: actions, labels and effective views, none of them negative."""
    kept = [*card.predicted_actions, *card.labels, *(name for name in card.objectives if name == "effective")]
    return tuple(name for name in kept if name not in card.negative_actions)


def score_session_lists(
    opened: LoadedRun,
    split: str,
    folder: str,
    max_events: int,
    gap_s: float,
    progress: Callable[[int, int], None] | None = None,
) -> SessionLists | None:
    """The session lists of a split, scored by the run's model. All ranks call it; rank 0 gets the lists.

    Scores are kept in ``folder``, a file per file of the split; those already there are not made again.

    Args:
        events: most recent impressions before a list that go with it.
        gap_s: seconds between the begins of two impressions beyond which a list ends.
        progress: called with the number of files done and of all.

    Raises:
        UserError: the split has no windows, the folder cannot be written, or a file in it is damaged.
    """
    files = opened.dataset.files(split)
    with sync_errors():
        if not files:
            raise DataError(f"split {split!r} has no windows", file=opened.dataset.split_dir(split))
        if opened.process.is_main:
            paths.ensure_writable_dir(folder)
    made = []
    for number, file in enumerate(files):
        if progress is not None:
            progress(number, len(files))
        scored = paths.join(folder, file.rsplit("/", 1)[-1])
        # One rank's view counts: ranks that disagreed would wait for each other.
        if not all_gather_object(paths.exists(scored))[0]:
            lists = _score_file(opened, split, file, max_events, gap_s)
            with sync_errors():
                if opened.process.is_main:
                    write_lists(scored, lists)
        made.append(scored)
    if progress is not None:
        progress(len(files), len(files))
    with sync_errors():
        return read_lists(made) if opened.process.is_main else None


@torch.no_grad()
def _score_file(opened: LoadedRun, split: str, file: str, max_events: int, gap_s: float) -> SessionLists:
    """The lists of one file, of all ranks, in the order of users and time: that of batches depends on the ranks."""
    batches = evaluation_batches(opened.dataset, split, opened.config, opened.process, request_gap_s=gap_s, file=file)
    opened.model.model_parallel.eval()
    parts = [_score_batch(opened, batch.to(opened.process.device), max_events) for batch in batches]
    lists = concatenate([part for rank in all_gather_object(parts) for part in rank])
    return lists.select(np.lexsort((lists.ts_ms, lists.user)))


def _score_batch(opened: LoadedRun, batch: WindowBatch, max_events: int) -> SessionLists:
    """The lists of one batch of requests, scored."""
    card = opened.card
    model = opened.model.model
    judged = predict_targets(
        model.embeddings(batch.sparse), model.ranker, batch, opened.config.evaluate.max_unexplored_mass
    )
    moment, length = torch.unique_consecutive(batch.query_index, return_counts=True)
    first = torch.cumsum(length, 0) - length
    seen, seen_length = recent_events(batch, first, max_events)
    happened, _ = target_outcomes(batch, len(card.actions))
    outcome = {name: happened[:, code] for code, name in enumerate(card.actions)}
    outcome |= dict(zip(card.labels, batch.labels.T, strict=True))
    outcome |= dict(zip(card.objectives, batch.objectives.T, strict=True))

    def host(values: Tensor, kind: torch.dtype | None = None) -> np.ndarray:
        array: np.ndarray = (values if kind is None else values.to(kind)).cpu().numpy()
        return array

    wanted = behavior_names(card)
    return SessionLists(
        objectives=tuple(objective.name for objective in prediction_objectives(card, model.ranker.objective_tasks)),
        behaviors=wanted,
        user=host(batch.user_key[batch.target_window[first]]),
        ts_ms=host(batch.ts_ms[moment]),
        length=host(length),
        events_length=host(seen_length),
        item=host(batch.ids(ITEM_ID)[batch.target]),
        predictions=host(judged.ensemble_inputs(EXIT in card.timed_actions)),
        label=host(torch.stack([outcome[name] for name in wanted], 1), torch.float32),
        context=host(judged.context, torch.float16),
        events=host(judged.event_embedding[seen], torch.float16),
    )
