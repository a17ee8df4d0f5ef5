"""Ranking of candidates for one user with a trained run (``a2gen rank --run``)."""

import numpy as np
import torch

from a2gen_rec.data.batch import FULL_WINDOW
from a2gen_rec.data.collate import collate
from a2gen_rec.data.items import find_candidate_items, popular_items
from a2gen_rec.ensemble import fit
from a2gen_rec.models.ensemble.io import EnsembleCard
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.scoring import predict_targets
from a2gen_rec.ranking.selection import RankingTask, Scorer, resolve_sort_key, top_candidates
from a2gen_rec.ranking.types import RankedList, RankQuery
from a2gen_rec.ranking.window import read_candidates
from a2gen_rec.runs.next_window import append_candidates_now, empty_window, read_latest_window
from a2gen_rec.training.loaded_run import DeviceChoice, LoadedRun, load_run

DEFAULT_CANDIDATES = 100
"""Number of popular items ranked if no candidates are given."""


def rank_run(
    run: str,
    user: str,
    candidates: str = "",
    sort_by: str = "",
    k: int = 10,
    data: str = "",
    device: DeviceChoice = "auto",
    ensemble: str = "",
) -> RankedList:
    """Rank candidates for a user with a run's best checkpoint, right after the user's last impression.

    Args:
        run: Run directory.
        user: Raw identifier; a user unknown to the dataset is ranked without history.
        candidates: File of raw item identifiers, one per line; by default the most frequent items in training.
        sort_by: ``ensemble``, ``watch`` or an outcome; by default the first available. Outcomes where lower is better
            (glances, explicit negatives) sort ascending.
        k: Number of candidates to return.
        data: Dataset directory; by default that of the run.
        device: Device of the model.
        ensemble: Ensemble directory; by default that of the run, if any.

    Raises:
        UserError: The run or file does not exist, there is no candidate, ``sort_by`` is unknown, the dataset violates
            its contract, or the ensemble belongs to another checkpoint.
    """
    item_ids = read_candidates(candidates) if candidates else []
    with load_run(run, data, device) as loaded:
        card = loaded.card
        loaded_ensemble = _load_ensemble(loaded, run, ensemble)
        sort_by = resolve_sort_key(
            card, sort_by, loaded.model.model.ranker.objective_tasks, loaded_ensemble is not None
        )
        items = (
            find_candidate_items(loaded.dataset, item_ids)
            if item_ids
            else popular_items(loaded.dataset, DEFAULT_CANDIDATES)
        )
        window = read_latest_window(loaded.dataset, user)
        history = empty_window(card) if window is None else window
        history_length = min(len(history.ts_ms), loaded.model.model.ranker.max_history)
        scorer = Scorer(card, loaded.model.model.ranker, loaded_ensemble)
        columns = append_candidates_now(history, items, card)
        full_tables, bucket_overhead = (
            loaded.model.model.tables.full_tables,
            loaded.config.loader.bucket_overhead_tokens,
        )
        batch = collate(
            columns,
            np.zeros(1, np.int64),
            full_tables,
            request_gap_s=FULL_WINDOW,
            bucket_overhead=bucket_overhead,
            vectors=loaded.dataset.open_vectors(),
        )
        batch = batch.to(loaded.process.device)
        loaded.model.model_parallel.eval()
        with torch.no_grad():
            embeddings = loaded.model.model.embeddings(batch.sparse)
            predictions = predict_targets(embeddings, scorer.ranker, batch, loaded.config.evaluate.max_unexplored_mass)
            (best,) = top_candidates(
                scorer, predictions, batch, [RankingTask(items, sort_by, RankQuery(user, items.ids, k=k, explain=True))]
            )
    unknown = int((~items.is_known).sum())
    return RankedList(
        user,
        window is not None,
        history_length,
        sort_by,
        len(items.ids),
        unknown,
        best,
        sort_by in scorer.lower_is_better,
    )


def _load_ensemble(loaded: LoadedRun, run: str, folder: str) -> tuple[Ensemble, EnsembleCard] | None:
    """Load the ensemble of ``folder``, or the run's default ensemble if it has one."""
    folder = folder or fit.default_ensemble_dir(run)
    if not folder:
        return None
    model, card = fit.load_compatible_ensemble(loaded, folder)
    return model.to(loaded.process.device), card
