"""What-if results equal the ranking with the changed prediction."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import CandidateItems
from a2gen_rec.errors import UserError
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.scoring import TargetPredictions, prediction_objectives
from a2gen_rec.ranking.selection import ENSEMBLE, RankingTask, Scorer, top_candidates
from a2gen_rec.ranking.types import RankQuery, WhatIf
from a2gen_rec.ranking.what_if import check_what_if, evaluate_what_if
from tests.helpers.cards import make_columns
from tests.helpers.properties import examples
from tests.helpers.random_card import make_card

CARD = make_card()
TASKS = ("glance", "effective")
WINDOWS = 3
NAMES = [objective.name for objective in prediction_objectives(CARD, TASKS)]


def random_case(seed: int) -> tuple[Scorer, TargetPredictions, WindowBatch, list[RankingTask]]:
    """Return a random ensemble and random predictions for the targets of random windows."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    batch = collate(make_columns(CARD, WINDOWS, rng), np.arange(WINDOWS), {}, dedup=False, request_gap_s=FULL_WINDOW)
    targets, keys = len(batch.target_window), len(batch.history_index)
    predictions = TargetPredictions(
        encoding=None,  # type: ignore[arg-type]
        probability=torch.rand(targets, len(NAMES) - 1),
        time=3 * torch.rand(targets, len(CARD.predicted_actions) + 1),
        context=torch.randn(targets, 4),
        event_embedding=torch.randn(keys, 5),
        marginals=None,  # type: ignore[arg-type]
    )
    ensemble = Ensemble(prediction_objectives(CARD, TASKS), d_event=5, d_context=4, dim=6)
    torch.nn.init.normal_(ensemble.query.weight)
    card: Any = SimpleNamespace(config=SimpleNamespace(max_history_events=4))
    ranker: Any = SimpleNamespace(objective_tasks=TASKS)
    counts = torch.bincount(batch.target_window, minlength=WINDOWS).tolist()
    tasks = []
    for count in counts:
        names = [f"i{number}" for number in range(count)]
        request = RankQuery("u", names, k=count, explain=True, include_timelines=False)
        tasks.append(
            RankingTask(CandidateItems(names, np.ones(count, bool), {}, *[np.zeros((count, 0))] * 2), ENSEMBLE, request)
        )
    return Scorer(CARD, ranker, (ensemble.eval(), card)), predictions, batch, tasks


@examples(20)
@given(st.integers(0, 10**6), st.sampled_from(NAMES), st.data())
def test_what_if_equals_the_ranking_of_the_changed_prediction(seed: int, name: str, data: st.DataObject) -> None:
    scorer, predictions, batch, tasks = random_case(seed)
    window = data.draw(st.integers(0, WINDOWS - 1))
    index = data.draw(st.integers(0, len(tasks[window].items.ids) - 1))
    changes = data.draw(st.lists(st.floats(-4, 4), min_size=1, max_size=4))
    item = f"i{index}"
    target = int((batch.target_window == window).nonzero()[index])
    with torch.no_grad():
        results = evaluate_what_if(WhatIf(item, name, changes), scorer, predictions, batch, window, tasks[window])
        for change, result in zip(changes, results, strict=True):
            probability, time = predictions.probability.clone(), predictions.time.clone()
            if name == "watch_time":
                time[target, -1] += change
                expected = max(0.0, math.expm1(float(time[target, -1])))
            else:
                odds = float(torch.logit(probability[target, NAMES.index(name)])) + change
                expected = 1 / (1 + math.exp(-odds))
                probability[target, NAMES.index(name)] = expected
            changed = replace(predictions, probability=probability, time=time)
            ranked = top_candidates(scorer, changed, batch, tasks)[window]
            (candidate,) = [candidate for candidate in ranked if candidate.item == item]
            (part,) = [part for part in candidate.explanation if part.objective == name]
            assert result.change == change
            assert result.prediction == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert result.score == pytest.approx(candidate.score, rel=1e-3, abs=1e-4)
            assert result.contribution == pytest.approx(part.contribution, rel=1e-3, abs=1e-4)
            ahead = sum(other.score > result.score + 1e-4 for other in ranked if other is not candidate)
            behind = sum(other.score < result.score - 1e-4 for other in ranked if other is not candidate)
            assert 1 + ahead <= result.rank <= len(ranked) - behind


@examples(10)
@given(st.integers(0, 10**6))
def test_better_predictions_never_lower_score_or_rank(seed: int) -> None:
    scorer, predictions, batch, tasks = random_case(seed)
    changes = np.linspace(-6, 6, 25).tolist()
    for objective in scorer.objectives:
        with torch.no_grad():
            results = evaluate_what_if(WhatIf("i0", objective.name, changes), scorer, predictions, batch, 0, tasks[0])
        rising = results if objective.higher_is_better else results[::-1]
        assert all(np.diff([result.score for result in rising]) > -1e-5)
        assert all(np.diff([result.rank for result in rising]) <= 0)
        assert all(np.diff([result.prediction for result in results]) >= 0)


def test_ties_are_ranked_by_name() -> None:
    """Without a change, a candidate among equal ones has the rank of the list."""
    scorer, predictions, batch, tasks = next(
        case for case in map(random_case, range(99)) if len(case[3][0].items.ids) >= 3
    )
    is_target = batch.target_window == 0
    for values in (predictions.probability, predictions.time, predictions.context):
        values[is_target] = values[is_target][:1].clone()
    with torch.no_grad():
        for rank, item in enumerate(tasks[0].items.ids, 1):
            (result,) = evaluate_what_if(WhatIf(item, "like", [0.0]), scorer, predictions, batch, 0, tasks[0])
            assert result.rank == rank


@pytest.mark.parametrize(
    ("what_if", "sort_by", "message"),
    [
        (WhatIf("i1", "like", [1.0]), "watch", "requires sort_by ensemble, not watch"),
        (WhatIf("i9", "like", [1.0]), ENSEMBLE, "'i9' is not a candidate"),
        (WhatIf("i1", "likes", [1.0]), ENSEMBLE, "unknown objective 'likes'; choose one of like, comment"),
    ],
)
def test_rejects_invalid_what_if_queries(what_if: WhatIf, sort_by: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_what_if(what_if, sort_by, ["i1", "i2"], random_case(0)[0])
