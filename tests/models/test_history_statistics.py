"""Statistics of the visible history against an oracle that loops over targets and impressions."""

import math

import numpy as np
import pytest
import torch

from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.schema import EFFECTIVE, FEEDBACK, GLANCE, NEGATIVE, UNKNOWN
from a2gen_rec.models.history_statistics import PRIOR_WEIGHT, RECENT, HistoryStatistics
from tests.helpers.cards import make_card, make_columns, small_config
from tests.helpers.models import build_double, lookup, make_batch

CARD = make_card()
CONFIG = small_config(statistics=True)
ITEM_FEATURES = [feature.name for feature in CARD.features_at("item")]


def outcomes(
    columns: WindowColumns, impression: int, card: DatasetCard
) -> tuple[list[float | None], list[float | None]]:
    """Return rates' outcomes and log1p seconds of timed actions of an impression; None if unknown."""
    start = columns.action_starts[impression]
    tokens = slice(start, start + columns.action_lengths[impression])
    times = dict(zip(columns.action[tokens].tolist(), columns.offset_s[tokens].tolist(), strict=True))
    rates: list[float | None] = [float(code in times) for code in range(1, len(card.actions) - 1)]
    rates += [None if math.isnan(label) else label for label in columns.labels[impression].tolist()]
    level = int(columns.outcome[FEEDBACK][impression])
    rates += [None if level == UNKNOWN else float(x) for x in (level == GLANCE, level >= EFFECTIVE, level == NEGATIVE)]
    timed = [code for code, name in enumerate(card.actions) if name in card.timed_actions]
    seconds = [times.get(code, math.nan) for code in timed]
    return rates, [None if math.isnan(value) else math.log1p(value) for value in seconds]


def smoothed(values: list[float | None], prior: float) -> float:
    known = [value for value in values if value is not None]
    return (sum(known) + PRIOR_WEIGHT * prior) / (len(known) + PRIOR_WEIGHT)


def expected(
    columns: WindowColumns, window: int, target: int, query: int, card: DatasetCard, limit: int
) -> list[float]:
    """Return the statistics of one target, group by group: all visible impressions, recent ones, then by feature."""
    start, now = columns.starts[window], columns.ts_ms[query]
    visible = [
        index
        for index in range(max(start, query - limit), query)
        if columns.ts_ms[index] < now and columns.end_ms[index] <= now
    ]
    ids = columns.impression_ids
    groups = [visible, visible[-RECENT:]]
    groups += [[i for i in visible if ids[name][i] == ids[name][target] != 0] for name in ITEM_FEATURES]
    module = HistoryStatistics(card, len(ITEM_FEATURES), True)
    own: tuple[list[float], list[float]] = ([], [])
    result = []
    for number, group in enumerate(groups):
        rows = [outcomes(columns, index, card) for index in group]
        rates, times = [], []
        for index, prior in enumerate(module.rate_prior.tolist()):
            base = own[0][index] if number else prior
            rates.append(smoothed([row[0][index] for row in rows], base))
        for index, prior in enumerate(module.time_prior.tolist()):
            base = own[1][index] if number else prior
            times.append(smoothed([row[1][index] for row in rows], base))
        bases = (module.rate_prior.tolist(), module.time_prior.tolist()) if not number else own
        result.append(math.log1p(len(group)))
        result += [math.log(rate / base) for rate, base in zip(rates, bases[0], strict=True)]
        result += [time - base for time, base in zip(times, bases[1], strict=True)]
        if not number:
            own = (rates, times)
    return result


def compute(batch: WindowBatch) -> torch.Tensor:
    ranker = build_double(CARD, CONFIG).ranker
    with torch.no_grad():
        return HistoryStatistics(CARD, len(ITEM_FEATURES), True)(batch, ranker._layout(batch))


@pytest.mark.parametrize("gap_s", [None, 20.0, FULL_WINDOW])
def test_equals_the_oracle(gap_s: float | None) -> None:
    columns = make_columns(CARD, 40, np.random.default_rng(0), max_length=14)
    batch = make_batch(CARD, columns, CONFIG, request_gap_s=gap_s)
    actual = compute(batch).numpy()
    assert actual.shape == (len(batch.target), HistoryStatistics(CARD, len(ITEM_FEATURES), True).num_statistics)
    nonzero = 0
    for row, (window, target, query) in enumerate(
        zip(batch.target_window.tolist(), batch.target.tolist(), batch.query_index.tolist(), strict=True)
    ):
        wanted = expected(columns, window, target, query, CARD, CARD.max_history)
        assert actual[row] == pytest.approx(wanted, abs=1e-4)
        nonzero += any(wanted)
    assert nonzero > 20


def test_a_user_without_history_has_zeros() -> None:
    columns = make_columns(CARD, 5, np.random.default_rng(1), max_length=1)
    assert compute(make_batch(CARD, columns, CONFIG)).abs().max() < 1e-6


def test_statistics_reach_the_context_of_every_model() -> None:
    """A change of one statistic of a target changes its predictions, and no other target's."""
    columns = make_columns(CARD, 4, np.random.default_rng(2))
    for name in ("a2gen", "mmoe", "ple", "hstu"):
        config = small_config(statistics=True, name=name)
        model = build_double(CARD, config, randomize=True)
        batch = make_batch(CARD, columns, config)
        before = model.ranker.encode(lookup(model, batch), batch).context
        batch.statistics[1, 0] += 1
        differs = (model.ranker.encode(lookup(model, batch), batch).context != before).any(1)
        assert differs.tolist() == [index == 1 for index in range(len(batch.target))], name
