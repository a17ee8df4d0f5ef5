"""Served predictions equal the evaluation's: impressions of a log as events, its targets as requests."""

import dataclasses
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from a2gen_rec.data.features.sessions import POSITION_EDGES
from a2gen_rec.data.schema import SESSION_POSITION
from a2gen_rec.evaluation.evaluate import evaluation_batches
from a2gen_rec.evaluation.predict import outcome_columns, predict
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.serving.engine.history_cache import HistoryCache
from a2gen_rec.training.loaded_run import load_run
from tests.helpers.logs import ITEM_FEATURES, Log, hashed_log, simulated_log
from tests.helpers.service import fast_store

pytestmark = pytest.mark.training


@pytest.fixture(scope="module", params=[simulated_log, hashed_log])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, str]:
    """Return a log and the export of its run in float32."""
    folder = tmp_path_factory.mktemp("replay")
    log = request.param(folder)
    export_run(log.run, str(folder / "model"), "fp32")
    return log, str(folder / "model")


def evaluated(log: Log) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Return the evaluation's predictions by (user, start time, item row); "watch" is in log1p seconds.

    ``statistics`` are those of the target, as of the start of its day.
    """
    users = pq.read_table(f"{log.data}/users.parquet").to_pydict()
    name = dict(zip(users["user_key"], users["user"], strict=True))
    with load_run(log.run) as opened:
        card, config, built = opened.card, opened.config, opened.model
        batches = list(evaluation_batches(opened.dataset, "test", config, opened.process))
        predictions, _ = predict(
            built.model_parallel, built.model.ranker, batches, card, config.evaluate.max_unexplored_mass
        )
    keys: list[tuple[str, int, int]] = []
    for batch in batches:
        user = [name[key] for key in batch.user_key[batch.target_window].tolist()]
        at = (batch.ts_ms[batch.target].tolist(), batch.ids("item_id")[batch.target].tolist())
        keys += zip(user, *at, strict=True)
    probabilities = [
        {name: row[column] for name, column in outcome_columns(card).items()} for row in predictions.probability
    ]
    rows = zip(predictions.time[:, -1].tolist(), torch.cat([batch.statistics for batch in batches]), strict=True)
    return {
        key: {**row, "watch": seconds, "statistics": statistics.numpy()}
        for key, row, (seconds, statistics) in zip(keys, probabilities, rows, strict=True)
    }


def context(impression: Impression) -> dict[str, object]:
    return {name: value for name, value in impression.features.items() if name not in ITEM_FEATURES}


def test_served_predictions_match_the_evaluation(exported: tuple[Log, str]) -> None:
    """The latest events are added one by one, as in a service; for half of the users, late."""
    log, folder = exported
    expected, ranker = evaluated(log), Ranker.load(folder)
    items = pq.read_table(f"{log.data}/items.parquet").to_pydict()
    row_of = dict(zip(items["item"], items["item_id"], strict=True))
    compared = 0
    for number, (user, impressions) in enumerate(sorted(log.impressions.items())[:12]):
        targets = [
            index
            for index, impression in enumerate(impressions)
            if (user, impression.ts_ms, row_of[impression.item]) in expected
        ]
        for index in targets[:2]:
            past, now = impressions[:index], impressions[index]
            history = ranker.encode(past[:-3])
            for some in (past[-3:-2], past[-2:-1], past[-1:]) if number % 2 else (past[-1:], past[-3:-1]):
                history = ranker.encode(some, history)
            target = expected[user, now.ts_ms, row_of[now.item]]
            # The export has the statistics after the log, the target those before its day.
            ranker._items.statistics[ranker._items.index_of[now.item]] = target["statistics"]
            query = RankQuery(user, [now.item], now.ts_ms, history, context=context(now))
            (candidate,) = ranker.rank(query).candidates
            for name, chance in candidate.probability.items():
                assert chance == pytest.approx(target[name], abs=1e-5), (user, index, name)
            assert candidate.expected_watch_s is not None
            assert np.log1p(candidate.expected_watch_s) == pytest.approx(max(target["watch"], 0.0), abs=1e-5)
            compared += 1
    assert compared >= 8


def test_raw_and_encoded_histories_are_equivalent(exported: tuple[Log, str]) -> None:
    log, folder = exported
    ranker = Ranker.load(folder)
    user, impressions = max(log.impressions.items(), key=lambda entry: len(entry[1]))
    names = sorted({impression.item for impression in impressions})
    encoded = ranker.rank(RankQuery(user, names, history=ranker.encode(impressions)))
    raw = ranker.rank(RankQuery(user, names, history=impressions[::-1]))
    assert raw == encoded
    # Later impressions do not matter.
    now = impressions[-3].ts_ms - 1
    past = [impression for impression in impressions if impression.ts_ms <= now]
    assert ranker.rank(RankQuery(user, names, now, impressions)) == ranker.rank(RankQuery(user, names, now, past))


def test_updated_impressions_replace_earlier_ones(exported: tuple[Log, str]) -> None:
    log, folder = exported
    ranker = Ranker.load(folder)
    _, impressions = max(log.impressions.items(), key=lambda entry: len(entry[1]))
    started = [dataclasses.replace(impression, watch_s=None, actions=()) for impression in impressions]
    late, encoded = ranker.encode(impressions, ranker.encode(started)), ranker.encode(impressions)
    assert late.items == encoded.items
    assert late.state_keys == encoded.state_keys
    for name, rows in encoded.columns.session.items():
        # The impression before the oldest one is gone, so the session features of the oldest one stay unchanged.
        assert late.columns.session[name][1:].tolist() == rows[1:].tolist()


def test_earlier_query_time_uses_the_earlier_history(exported: tuple[Log, str], tmp_path: Path) -> None:
    """A user with many later impressions; the cached history stays valid."""
    log, folder = exported
    ranker, store = Ranker.load(folder), fast_store(tmp_path)
    user, impressions = max(log.impressions.items(), key=lambda entry: len(entry[1]))
    assert len(impressions) > 2 * ranker.card.max_history
    store.put(user, impressions).result(5)
    cache = HistoryCache(ranker, store, 10**6)
    for index in (len(impressions) - 2, len(impressions) // 2, 1):
        now = impressions[index].ts_ms
        past = [impression for impression in impressions if impression.ts_ms <= now]
        query = RankQuery(user, ["v"], now, past)
        recorded = dataclasses.replace(query, history=cache.get(user, now))
        assert ranker.rank(recorded) == ranker.rank(query)
    assert cache.get(user, impressions[0].ts_ms - 1).up_to(impressions[0].ts_ms - 1).items == []
    assert cache.get(user, impressions[-1].ts_ms) is cache.get(user)
    assert cache.misses == 1
    store.close()


def test_session_positions_match_the_full_log(exported: tuple[Log, str], tmp_path: Path) -> None:
    """A session longer than the impressions that are read, after another session."""
    ranker, store = Ranker.load(exported[1]), fast_store(tmp_path)
    warm, last = HistoryCache(ranker, store, 10**6), ranker.card.max_history
    times = [10**12 + 1000 * number for number in range(60)]
    times += [times[-1] + round(1000 * ranker.card.session_gap_s) + 1000 * number for number in range(1, 160)]
    positions = [*range(1, 61), *range(1, 160)]
    rows = [1 + bisect_right(POSITION_EDGES, index) for index in positions]
    pending = []
    for count, ts_ms in enumerate(times, 1):
        pending.append(Impression("v", ts_ms))
        if count % 13 == 0 or count == len(times):
            store.put("u", pending).result(5)
            pending = []
            for cache in (warm, HistoryCache(ranker, store, 10**6)):
                positions_read = cache.get("u").columns.session[SESSION_POSITION]
                assert positions_read[-last:].tolist() == rows[:count][-last:], count
    store.close()
