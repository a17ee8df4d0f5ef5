"""What-if queries: re-run the ensemble with one predicted objective of one candidate changed."""

import math
from collections.abc import Sequence

import torch

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import EXIT, WATCH_TIME
from a2gen_rec.errors import UserError
from a2gen_rec.models.scoring import TargetPredictions
from a2gen_rec.ranking.checks import describe_value, is_number
from a2gen_rec.ranking.selection import ENSEMBLE, RankingTask, Scorer, ensemble_history
from a2gen_rec.ranking.types import WhatIf, WhatIfResult


def check_what_if(what_if: WhatIf, sort_by: str, candidates: Sequence[str], scorer: Scorer) -> None:
    """Raise a UserError if the what-if query does not match its request or the model."""
    if sort_by != ENSEMBLE:
        raise UserError(f"what_if: requires sort_by {ENSEMBLE}, not {sort_by}")
    if what_if.item not in candidates:
        raise UserError(f"what_if: {what_if.item!r} is not a candidate")
    names = [objective.name for objective in scorer.objectives]
    if what_if.objective not in names:
        raise UserError(f"what_if: unknown objective {what_if.objective!r}; choose one of {', '.join(names)}")
    for change in what_if.changes:
        if not is_number(change) or not math.isfinite(change):
            raise UserError(f"what_if: change {describe_value(change)} must be a finite number")


def evaluate_what_if(
    what_if: WhatIf,
    scorer: Scorer,
    predictions: TargetPredictions,
    batch: WindowBatch,
    window: int,
    task: RankingTask,
) -> list[WhatIfResult]:
    """Return the candidate's score and rank for each change, with all other predictions fixed.

    Args:
        what_if: The query.
        scorer: Ranker and ensemble.
        predictions: Predictions of all targets of the batch.
        batch: One window per request, whose targets are its candidates.
        window: Index of this request's window.
        task: The request's candidates.
    """
    assert scorer.ensemble is not None
    model, card = scorer.ensemble
    with_watch = EXIT in scorer.card.timed_actions
    is_target = batch.target_window == window
    index = task.items.ids.index(what_if.item)
    k = [objective.name for objective in scorer.objectives].index(what_if.objective)
    change = torch.tensor(what_if.changes)
    value, context = predictions.ensemble_inputs(with_watch)[is_target], predictions.context[is_target]
    copies = value[index].repeat(len(change), 1)
    copies[:, k] += change
    history, length = ensemble_history(card, predictions, batch)
    # The changed copies are appended to the list: no score depends on the other candidates.
    output = model(
        torch.cat([value, copies])[None],
        history[window, None],
        length[window, None],
        torch.cat([context, context[index].repeat(len(change), 1)])[None],
    )
    count = len(value)
    scores, changed = output.score[0].split([count, len(change)])
    is_ahead = scores > changed[:, None]
    is_ahead[:, :index] |= scores[:index] == changed[:, None]  # ties by raw identifier, as in the ranked list
    is_ahead[:, index] = False
    contribution = (output.weight * output.transform)[0, count:, k]
    prediction = torch.expm1(copies[:, k]).clamp(min=0) if what_if.objective == WATCH_TIME else copies[:, k].sigmoid()
    ranks = (1 + is_ahead.sum(1)).tolist()
    columns = (what_if.changes, prediction.tolist(), contribution.tolist(), changed.tolist(), ranks)
    return [WhatIfResult(*row) for row in zip(*columns, strict=True)]
