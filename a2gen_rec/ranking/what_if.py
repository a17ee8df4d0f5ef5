"""What would become of a candidate, were one objective of it predicted otherwise: the ensemble itself is asked."""

from collections.abc import Sequence

import torch

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import EXIT, WATCH_TIME
from a2gen_rec.errors import UserError
from a2gen_rec.models.scoring import TargetPredictions
from a2gen_rec.ranking.selection import ENSEMBLE, RankingTask, Scorer, ensemble_history
from a2gen_rec.ranking.types import WhatIf, WhatIfResult


def check_what_if(nudge: WhatIf, by: str, candidates: Sequence[str], scorer: Scorer) -> None:
    """Raise a UserError for one that does not fit its request or the model."""
    if by != ENSEMBLE:
        raise UserError(f"nudge: needs candidates ranked by {ENSEMBLE}, not by {by}")
    if nudge.item not in candidates:
        raise UserError(f"nudge: {nudge.item!r} is not a candidate")
    names = [objective.name for objective in scorer.objectives]
    if nudge.objective not in names:
        raise UserError(f"nudge: no objective {nudge.objective!r}; there are {', '.join(names)}")


def evaluate_what_if(
    nudge: WhatIf, scorer: Scorer, judged: TargetPredictions, batch: WindowBatch, window: int, order: RankingTask
) -> list[WhatIfResult]:
    """What becomes of the candidate at each change, all else as predicted.

    Args:
        batch: a window for each request, whose targets are its items; window: of this request.
    """
    assert scorer.ensemble is not None
    model, card = scorer.ensemble
    with_watch = EXIT in scorer.card.timed_actions
    mine = batch.target_window == window
    at = order.items.ids.index(nudge.item)
    k = [objective.name for objective in scorer.objectives].index(nudge.objective)
    change = torch.tensor(nudge.changes)
    value, context = judged.ensemble_inputs(with_watch)[mine], judged.context[mine]
    copies = value[at].repeat(len(change), 1)
    copies[:, k] += change
    events, length = ensemble_history(card, judged, batch)
    # Beside the others in one list: none of the ensemble's scores depends on which others there are.
    output = model(
        torch.cat([value, copies])[None],
        events[window, None],
        length[window, None],
        torch.cat([context, context[at].repeat(len(change), 1)])[None],
    )
    count = len(value)
    others, own = output.score[0].split([count, len(change)])
    ahead = others > own[:, None]
    ahead[:, :at] |= others[:at] == own[:, None]  # equals by raw identifier, as the list has them
    ahead[:, at] = False
    share = (output.weight * output.transform)[0, count:, k]
    prediction = torch.expm1(copies[:, k]).clamp(min=0) if nudge.objective == WATCH_TIME else copies[:, k].sigmoid()
    columns = (nudge.changes, prediction.tolist(), share.tolist(), own.tolist(), (1 + ahead.sum(1)).tolist())
    return [WhatIfResult(*row) for row in zip(*columns, strict=True)]
