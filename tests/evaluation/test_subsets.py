"""Metrics on new and known users and items."""

from dataclasses import replace

import numpy as np

from a2gen_rec.data.schema import ITEM_ID
from a2gen_rec.evaluation.evaluate import action_metrics, subset_metrics
from a2gen_rec.evaluation.metrics import auc
from a2gen_rec.evaluation.predict import outcome_columns
from tests.helpers.cards import make_card
from tests.helpers.experiments import make_predictions

CARD = make_card()


def test_subsets_have_the_metrics_of_their_rows() -> None:
    predictions = make_predictions(CARD, 1.0, seed=0, new_items=0.4)
    predictions.user_row[:] = np.arange(len(predictions.user)) % 3
    subsets = subset_metrics(predictions, CARD)
    rows = {
        "new users": predictions.user_row == 0,
        "known users": predictions.user_row > 0,
        "new items": predictions.item == 0,
        "known items": predictions.item > 0,
    }
    assert subsets.keys() == rows.keys()
    for name, included in rows.items():
        assert 50 < subsets[name]["targets"] == included.sum()
        for outcome in CARD.predicted_actions:
            column = outcome_columns(CARD)[outcome]
            expected = auc(predictions.probability[included, column], predictions.occurred[included, column])
            assert subsets[name]["actions"][outcome]["auc"] == expected
        error = np.abs(predictions.time - predictions.observed_time)[included, outcome_columns(CARD)["exit"]]
        assert np.isclose(subsets[name]["time"]["exit"]["mae_log"], np.nanmean(error))


def test_subsets_without_rows_are_missing() -> None:
    predictions = make_predictions(CARD, 1.0, seed=0)
    subsets = subset_metrics(predictions, CARD)
    assert list(subsets) == ["known items"], "users have no table, no item is new"
    assert subsets["known items"]["actions"] == action_metrics(predictions, predictions.probability, CARD)


def test_items_without_a_vocabulary_have_no_subsets() -> None:
    """A hash function has no row of unknown values."""
    features = [replace(each, kind="hash") if each.name == ITEM_ID else each for each in CARD.features]
    predictions = make_predictions(CARD, 1.0, seed=0, new_items=0.4)
    predictions.user_row[:] = 1
    assert list(subset_metrics(predictions, replace(CARD, features=features))) == ["known users"]
