"""Flat rows of targets: an oracle of Python loops, and independence from the future."""

import math
from dataclasses import replace

import numpy as np
import pytest

from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.schema import EFFECTIVE, GLANCE, NEGATIVE, UNKNOWN
from a2gen_rec.gbdt.ranker import GBDTRanker
from a2gen_rec.models.flat_inputs import NUM_LATEST
from a2gen_rec.models.history_statistics import PRIOR_WEIGHT, RECENT
from tests.helpers.cards import (
    full_tables,
    make_card,
    make_columns,
    make_rich_card,
    random_vectors,
    small_config,
)

CARD = make_card()
CONFIG = small_config(session_features=True, feedback_encoding="tokens")
RATES = [*CARD.predicted_actions, *CARD.labels, "glance", "effective", "negative"]
TIMES = [name for name in CARD.actions if name in CARD.timed_actions]
ITEM_FEATURES = ["item_id", "author_id"]


def flat_rows(columns: WindowColumns, ranker: GBDTRanker) -> np.ndarray:
    batch = collate(columns, np.arange(len(columns)), full_tables(CARD, CONFIG))
    return ranker.rows(batch).numpy()


def outcomes(columns: WindowColumns, impression: int) -> dict[str, float]:
    """Return the outcomes of an impression by name; NaN if unknown."""
    first = columns.action_starts[impression]
    tokens = range(first, first + columns.action_lengths[impression])
    seconds = {CARD.actions[columns.action[token]]: float(columns.offset_s[token]) for token in tokens}
    level = columns.outcome["feedback"][impression]
    values = {name: float(name in seconds) for name in CARD.predicted_actions}
    values |= {name: float(columns.labels[impression, column]) for column, name in enumerate(CARD.labels)}
    feedback = {"glance": level == GLANCE, "effective": level >= EFFECTIVE, "negative": level == NEGATIVE}
    values |= {name: math.nan if level == UNKNOWN else float(value) for name, value in feedback.items()}
    return values | {f"time of {name}": math.log1p(seconds.get(name, math.nan)) for name in TIMES}


def group_statistics(columns: WindowColumns, group: list[int], prior: dict[str, float]) -> dict[str, float]:
    """Return the smoothed rates and mean times of the impressions of a group."""
    smoothed = {}
    for name, value in prior.items():
        values = [x for impression in group if not math.isnan(x := outcomes(columns, impression)[name])]
        smoothed[name] = (sum(values) + PRIOR_WEIGHT * value) / (len(values) + PRIOR_WEIGHT)
    return smoothed


def oracle_row(columns: WindowColumns, window: int, position: int, target: int) -> dict[str, float]:
    first, now = columns.starts[window], columns.ts_ms[target]
    visible = [
        impression
        for impression in range(first, target)
        if impression >= target - CARD.max_history
        and columns.ts_ms[impression] < now
        and columns.end_ms[impression] <= now
    ]
    row = {name: values[window] for name, values in columns.user_ids.items()}
    row |= {name: values[target] for name, values in (columns.impression_ids | columns.session).items()}
    for column, statistic in enumerate(CARD.statistics):
        value = columns.statistics[columns.target_starts[window] + position, column]
        row[f"{statistic.feature}: {statistic.outcome}"] = value

    def is_same(name: str, impression: int) -> bool:
        value = columns.impression_ids[name][target]
        return bool(value != 0 and value == columns.impression_ids[name][impression])

    prior = {name: max(CARD.base_rate.get(name, 0.0), 1e-4) for name in RATES}
    prior |= {f"time of {name}": math.log1p(CARD.median_time_s[name]) for name in TIMES}
    own = group_statistics(columns, visible, prior)
    groups = {"history": (visible, prior), f"latest {RECENT}": (visible[-RECENT:], own)}
    groups |= {f"history of {name}": ([i for i in visible if is_same(name, i)], own) for name in ITEM_FEATURES}
    for group, (impressions, reference) in groups.items():
        row[f"{group}: impressions"] = math.log1p(len(impressions))
        for name, value in group_statistics(columns, impressions, reference).items():
            is_time = name.startswith("time of")
            row[f"{group}: {name}"] = value - reference[name] if is_time else math.log(value / reference[name])
    for number in range(1, NUM_LATEST + 1):
        latest = visible[-number] if len(visible) >= number else None
        values = dict.fromkeys([*prior, "time since", *(f"same {name}" for name in ITEM_FEATURES)], math.nan)
        if latest is not None:
            values = outcomes(columns, latest) | {"time since": math.log1p((now - columns.ts_ms[latest]) / 1000)}
            values |= {f"same {name}": float(is_same(name, latest)) for name in ITEM_FEATURES}
        row |= {f"latest {number}: {name}": value for name, value in values.items()}
    return row


def test_equals_loops_over_impressions() -> None:
    columns = make_columns(CARD, 25, np.random.default_rng(3))
    ranker = GBDTRanker(CARD, CONFIG)
    rows, index = flat_rows(columns, ranker), 0
    assert len(set(ranker.columns)) == len(ranker.columns)
    for window in range(len(columns)):
        first, count = columns.starts[window] + columns.first_target[window], columns.lengths[window]
        for position, target in enumerate(range(first, columns.starts[window] + count)):
            expected = oracle_row(columns, window, position, target)
            assert set(expected) == set(ranker.columns)
            np.testing.assert_allclose(
                rows[index], [expected[name] for name in ranker.columns], rtol=2e-5, atol=2e-5, err_msg=str(target)
            )
            index += 1
    assert index == len(rows)
    assert np.isfinite(rows[:, ranker.columns.index("latest 3: like")]).any()


def test_rows_contain_numbers_vectors_and_first_values() -> None:
    card = make_rich_card()
    columns = make_columns(card, 20, np.random.default_rng(5))
    ranker = GBDTRanker(card, CONFIG)
    vectors = random_vectors(card, np.random.default_rng(6))
    batch = collate(columns, np.arange(len(columns)), full_tables(card, CONFIG), vectors=vectors)
    rows = ranker.rows(batch).numpy()
    assert rows.shape == (len(batch.target), len(ranker.columns))

    def column(name: str) -> np.ndarray:
        return rows[:, ranker.columns.index(name)]

    target, query = batch.target.numpy(), batch.query_index.numpy()
    for level, index in (("item", target), ("context", query)):
        names = [number.name for number in card.numbers_at(level)]
        first = 0 if level == "item" else len(card.numbers_at("item"))
        for position, name in enumerate(names, first):
            np.testing.assert_array_equal(column(name), batch.numbers.numpy()[index, position])
    bags = columns.impression_bags["tags"]
    flat = [bags[np.array([impression])].ids[0] for impression in target]
    np.testing.assert_array_equal(column("tags"), flat)
    vector = batch.vectors["content"].numpy()[batch.vector_index.numpy()[target]]
    np.testing.assert_array_equal(column("content 2"), vector[:, 2])


def test_reads_neither_outcomes_of_the_target_nor_later_impressions() -> None:
    rng = np.random.default_rng(4)
    columns = make_columns(CARD, 12, rng)
    ranker = GBDTRanker(CARD, CONFIG)
    rows, index, sees_history = flat_rows(columns, ranker), 0, 0
    for window in range(len(columns)):
        end = columns.starts[window] + columns.lengths[window]
        for target in range(columns.starts[window] + columns.first_target[window], end):
            changed = flat_rows(with_other_future(columns, target, end, rng), ranker)
            np.testing.assert_array_equal(changed[index], rows[index])
            if target > columns.starts[window]:  # the test can fail: the past is read
                changed = flat_rows(with_other_future(columns, target - 1, end, rng), ranker)
                sees_history += not np.array_equal(changed[index], rows[index], equal_nan=True)
            index += 1
    assert sees_history > 5


def with_other_future(columns: WindowColumns, target: int, end: int, rng: np.random.Generator) -> WindowColumns:
    """Return windows with other outcomes from ``target`` on, and other features after it, up to ``end``."""
    first = columns.action_starts[target]
    tokens = slice(first, columns.action_starts[end - 1] + columns.action_lengths[end - 1])
    own, later = slice(target, end), slice(target + 1, end)

    def shuffled(values: np.ndarray, part: slice, high: int) -> np.ndarray:
        values = values.copy()
        values[part] = (values[part] + 1) % high
        return values

    action = columns.action.copy()
    inner = (action[tokens] > 0) & (action[tokens] < len(CARD.actions) - 1)
    action[tokens] = np.where(inner, 1 + action[tokens] % 3, action[tokens])
    offset_s, end_ms, labels, objectives = (
        values.copy() for values in (columns.offset_s, columns.end_ms, columns.labels, columns.objectives)
    )
    offset_s[tokens] += 1.5
    end_ms[own] += 1500
    labels[own] = 1 - labels[own]
    objectives[own] = rng.random(objectives[own].shape)
    sizes = {feature.name: feature.cardinality for feature in CARD.features}
    return replace(
        columns,
        action=action,
        offset_s=offset_s,
        end_ms=end_ms,
        labels=labels,
        objectives=objectives,
        outcome={name: shuffled(values, own, sizes[name]) for name, values in columns.outcome.items()},
        session={name: shuffled(values, later, sizes[name]) for name, values in columns.session.items()},
        impression_ids={name: shuffled(values, later, sizes[name]) for name, values in columns.impression_ids.items()},
    )


@pytest.mark.parametrize("statistics", [True, False])
def test_columns_follow_the_settings(statistics: bool) -> None:
    config = small_config(statistics=statistics)
    config.gbdt.max_cardinality = 9
    ranker = GBDTRanker(CARD, config)
    assert ranker.columns[:3] == ["group", "author_id", "tab"], "user_id and item_id have more rows"
    assert "session_gap" not in ranker.columns
    assert "latest 1: glance" not in ranker.columns, "feedback_encoding is none"
    assert ("item_id: like" in ranker.columns) == ("history: like" in ranker.columns) == statistics
    assert "latest 1: like" in ranker.columns
    batch = collate(make_columns(CARD, 3, np.random.default_rng(0)), np.arange(3), full_tables(CARD, config))
    assert ranker.rows(batch).shape == (len(batch.target), len(ranker.columns))
