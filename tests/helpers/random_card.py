"""Dataset card of the random test datasets; imports no torch."""

from dataclasses import replace

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.inputs import Number, Vector
from a2gen_rec.data.schema import FEEDBACK_LEVELS, SPLITS, Feature, FeedbackRule, SplitSummary, Statistic

ACTIONS = ["start", "like", "comment", "follow", "exit"]


def make_card(labels: tuple[str, ...] = ("click",), timed: tuple[str, ...] = ("like", "follow", "exit")) -> DatasetCard:
    features = [
        Feature("user_id", "user", "vocabulary", 30),
        Feature("group", "user", "vocabulary", 4),
        Feature("item_id", "item", "vocabulary", 40),
        Feature("author_id", "item", "hash", 9),
        Feature("tab", "context", "vocabulary", 5),
        Feature("session_position", "session", "buckets", 4, [2.0, 4.0]),
        Feature("session_gap", "session", "buckets", 5, [5.0, 10.0, 20.0]),
        Feature("previous_feedback", "session", "code", len(FEEDBACK_LEVELS)),
        Feature("feedback", "outcome", "code", len(FEEDBACK_LEVELS)),
        Feature("watch_ratio", "outcome", "buckets", 4, [0.5, 1.0]),
    ]
    objectives = ["glance", "effective"]
    names = [*ACTIONS[1:-1], *labels, *objectives]
    levels = dict.fromkeys(FEEDBACK_LEVELS, 0)
    split = SplitSummary(1, 1, first_ms=0, last_ms=0, positives=dict.fromkeys(names, 0), feedback=levels)
    return DatasetCard(
        name="random",
        actions=ACTIONS,
        timed_actions=list(timed),
        labels=list(labels),
        objectives=objectives,
        features=features,
        feedback=FeedbackRule(3.0, [], "length", [10.0], [9.0, 5.0, 12.0]),
        negative_actions=[],
        session_gap_s=25.0,
        max_history=6,
        max_targets=4,
        has_calendar_time=True,
        splits=dict.fromkeys(SPLITS, split),
        base_rate=dict.fromkeys(names, 0.3),
        median_time_s=dict.fromkeys([*ACTIONS[1:-1], "exit"], 5.0),
        oracle_columns=[],
        dropped_rows={},
        source={"name": "random"},
        command="",
        statistics=[
            Statistic("item_id", "impressions", "count", 0.0),
            Statistic("item_id", "like", "rate", 0.3),
            Statistic("author_id", "watch_time", "mean", 1.8),
        ],
    )


def make_rich_card() -> DatasetCard:
    """Return a card with numbers and multi-valued features of every level, and a vector."""
    card = make_card()
    bags = [
        Feature("hobbies", "user", "vocabulary", 7, multi_valued=True),
        Feature("tags", "item", "vocabulary", 12, multi_valued=True, weighted=True),
        Feature("topics", "item", "hash", 6, multi_valued=True),
        Feature("moods", "context", "vocabulary", 5, multi_valued=True),
    ]
    numbers = [
        Number("age", "user", "none", 30.0, 10.0),
        Number("price", "item", "log1p", 2.0, 1.5),
        Number("quality", "item", "none", 0.0, 1.0),
        Number("battery", "context", "none", 50.0, 20.0),
    ]
    vectors = [Vector("content", 5, 2.0)]
    return replace(card, features=[*card.features, *bags], numbers=numbers, vectors=vectors)
