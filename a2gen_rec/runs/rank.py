"""Ranking candidates for one user with a trained run (``a2gen rank --run``)."""

import numpy as np
import torch

from a2gen_rec.data.batch import ALL, collate
from a2gen_rec.data.items import find_items, popular_items
from a2gen_rec.ensemble import fit
from a2gen_rec.models.embedding_tables import whole_tables
from a2gen_rec.models.ensemble.io import EnsembleCard
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.scoring import judge
from a2gen_rec.ranking.selection import Order, Scorer, best_candidates, order_by
from a2gen_rec.ranking.types import RankedList, Request
from a2gen_rec.ranking.window import read_candidates
from a2gen_rec.runs.next_window import latest_window, next_window, no_history
from a2gen_rec.training.loaded_run import Device, OpenRun, open_run

POPULAR = 100


def rank(
    run: str,
    user: str,
    candidates: str = "",
    by: str = "",
    top: int = 10,
    data: str = "",
    device: Device = "auto",
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
    with open_run(run, data, device) as opened:
        card = opened.card
        fused = _ensemble(opened, run, ensemble)
        by = order_by(card, by, opened.built.model.ranker.tasks, fused is not None)
        items = find_items(opened.data, card, wanted) if wanted else popular_items(opened.data, card, POPULAR)
        window = latest_window(opened.data, card, user)
        history = no_history(card) if window is None else window
        seen = min(len(history.ts_ms), opened.built.model.ranker.history)
        scorer = Scorer(card, opened.built.model.ranker, fused)
        columns = next_window(history, items, card)
        whole, group_cost = whole_tables(card, opened.config.model), opened.config.loader.group_cost
        batch = collate(columns, np.zeros(1, np.int64), whole, request_gap_s=ALL, group_cost=group_cost)
        batch = batch.to(opened.process.device)
        opened.built.dmp.eval()
        with torch.no_grad():
            looked_up = opened.built.model.embeddings(batch.sparse)
            judged = judge(looked_up, scorer.ranker, batch, opened.config.evaluate.max_error)
            (best,) = best_candidates(
                scorer, judged, batch, [Order(items, by, Request(user, items.raw, k=top, explain=True))]
            )
    unknown = int((~items.known).sum())
    return RankedList(user, window is not None, seen, by, len(items.raw), unknown, best, by in scorer.less)


def _ensemble(opened: OpenRun, run: str, folder: str) -> tuple[Ensemble, EnsembleCard] | None:
    """The ensemble of a folder, or the run's own if it has one."""
    folder = folder or fit.found(run)
    if not folder:
        return None
    model, card = fit.load_fitting(opened, folder)
    return model.to(opened.process.device), card
