"""Ranking candidates for one user with a trained run (``a2gen rank --run``)."""

import numpy as np
import torch

from a2gen_rec.data.batch import WHOLE_WINDOW, collate
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
    """Rank candidates for a user by a run's best checkpoint, right after the user's last impression.

    Args:
        run: the run's folder.
        user: raw identifier; one that the dataset does not have is ranked for without history.
        candidates: file of raw item identifiers, one a line; by default the items most shown in training.
        by: ``ensemble``, ``watch``, or an outcome; by default the first of these that there is. Where less is better
            (glances, explicit negatives), the least likely come first.
        top: how many of the best to return.
        data: dataset folder; by default the run's own.
        ensemble: its folder; by default the run's own, if it has one.

    Raises:
        UserError: no such run or file, no candidate, nothing of the name ``by``; the dataset breaks its contract; the
            ensemble is of another checkpoint.
    """
    wanted = read_candidates(candidates) if candidates else []
    with load_run(run, data, device) as opened:
        card = opened.card
        fused = _ensemble(opened, run, ensemble)
        sort_by = resolve_sort_key(card, sort_by, opened.model.model.ranker.objective_tasks, fused is not None)
        items = (
            find_candidate_items(opened.dataset, wanted)
            if wanted
            else popular_items(opened.dataset, DEFAULT_CANDIDATES)
        )
        window = read_latest_window(opened.dataset, user)
        history = empty_window(card) if window is None else window
        seen = min(len(history.ts_ms), opened.model.model.ranker.max_history)
        scorer = Scorer(card, opened.model.model.ranker, fused)
        columns = append_candidates_now(history, items, card)
        full_tables, bucket_overhead = (
            opened.model.model.tables.full_tables,
            opened.config.loader.bucket_overhead_tokens,
        )
        batch = collate(
            columns, np.zeros(1, np.int64), full_tables, request_gap_s=WHOLE_WINDOW, bucket_overhead=bucket_overhead
        )
        batch = batch.to(opened.process.device)
        opened.model.model_parallel.eval()
        with torch.no_grad():
            looked_up = opened.model.model.embeddings(batch.sparse)
            judged = predict_targets(looked_up, scorer.ranker, batch, opened.config.evaluate.max_unexplored_mass)
            (best,) = top_candidates(
                scorer, judged, batch, [RankingTask(items, sort_by, RankQuery(user, items.ids, k=k, explain=True))]
            )
    unknown = int((~items.is_known).sum())
    return RankedList(
        user, window is not None, seen, sort_by, len(items.ids), unknown, best, sort_by in scorer.lower_is_better
    )


def _ensemble(opened: LoadedRun, run: str, folder: str) -> tuple[Ensemble, EnsembleCard] | None:
    """The ensemble of a folder, or the run's own if it has one."""
    folder = folder or fit.default_ensemble_dir(run)
    if not folder:
        return None
    model, card = fit.load_compatible_ensemble(opened, folder)
    return model.to(opened.process.device), card
