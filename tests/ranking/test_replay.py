"""What is served equals what is evaluated: a log's impressions as events, its targets as requests."""

import dataclasses
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from a2gen_rec.data.features.sessions import POSITION_EDGES
from a2gen_rec.data.schema import SESSION_POSITION
from a2gen_rec.evaluation.evaluate import evaluation_batches
from a2gen_rec.evaluation.predict import outcome_columns, predict
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.serving.engine.history_cache import HistoryCache
from a2gen_rec.training.loaded_run import load_run
from tests.helpers.logs import Log, hashed_log, simulated_log
from tests.helpers.service import fast_store


@pytest.fixture(scope="module", params=[simulated_log, hashed_log])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, str]:
    """A log and its run's export in float32."""
    folder = tmp_path_factory.mktemp("replay")
    log = request.param(folder)
    export_run(log.run, str(folder / "model"), "fp32")
    return log, str(folder / "model")


def evaluated(log: Log) -> dict[tuple[str, int, int], dict[str, float]]:
    """User, begin and item's row of every test target -> what the evaluation predicts, "watch" being log1p seconds."""
    users = pq.read_table(f"{log.data}/users.parquet").to_pydict()
    name = dict(zip(users["user_key"], users["user"], strict=True))
    with load_run(log.run) as opened:
        card, config, built = opened.card, opened.config, opened.model
        batches = list(evaluation_batches(opened.dataset, "test", config, opened.process))
        found, _ = predict(built.model_parallel, built.model.ranker, batches, card, config.evaluate.max_unexplored_mass)
    keys: list[tuple[str, int, int]] = []
    for batch in batches:
        user = [name[key] for key in batch.user_key[batch.target_window].tolist()]
        at = (batch.ts_ms[batch.target].tolist(), batch.ids("item_id")[batch.target].tolist())
        keys += zip(user, *at, strict=True)
    told = [{each: row[column] for each, column in outcome_columns(card).items()} for row in found.probability]
    watch = found.time[:, -1].tolist()
    return {key: {**each, "watch": seconds} for key, each, seconds in zip(keys, told, watch, strict=True)}


def context(impression: Impression) -> dict[str, object]:
    return {name: value for name, value in impression.features.items() if name not in ("shop", "length")}


def test_events_then_requests_give_the_evaluation_s_predictions(world: tuple[Log, str]) -> None:
    """The last events one by one, as a server gets them; those of half of the users late."""
    log, folder = world
    expected, ranker = evaluated(log), Ranker.load(folder)
    items = pq.read_table(f"{log.data}/items.parquet").to_pydict()
    row_of = dict(zip(items["item"], items["item_id"], strict=True))
    compared = 0
    for number, (user, impressions) in enumerate(sorted(log.impressions.items())[:12]):
        targets = [place for place, each in enumerate(impressions) if (user, each.ts_ms, row_of[each.item]) in expected]
        for place in targets[:2]:
            past, now = impressions[:place], impressions[place]
            history = ranker.encode(past[:-3])
            for some in (past[-3:-2], past[-2:-1], past[-1:]) if number % 2 else (past[-1:], past[-3:-1]):
                history = ranker.encode(some, history)
            asked = RankQuery(user, [now.item], now.ts_ms, history, context=context(now))
            (found,) = ranker.rank(asked).candidates
            target = expected[user, now.ts_ms, row_of[now.item]]
            for name, chance in found.probability.items():
                assert chance == pytest.approx(target[name], abs=1e-5), (user, place, name)
            assert found.expected_watch_s is not None
            assert np.log1p(found.expected_watch_s) == pytest.approx(max(target["watch"], 0.0), abs=1e-5)
            compared += 1
    assert compared >= 8


def test_a_raw_history_is_as_good_as_a_kept_one(world: tuple[Log, str]) -> None:
    log, folder = world
    ranker = Ranker.load(folder)
    user, impressions = max(log.impressions.items(), key=lambda each: len(each[1]))
    names = sorted({each.item for each in impressions})
    kept = ranker.rank(RankQuery(user, names, history=ranker.encode(impressions)))
    raw = ranker.rank(RankQuery(user, names, history=impressions[::-1]))
    assert raw == kept
    # What had not begun does not matter.
    now = impressions[-3].ts_ms - 1
    past = [each for each in impressions if each.ts_ms <= now]
    assert ranker.rank(RankQuery(user, names, now, impressions)) == ranker.rank(RankQuery(user, names, now, past))


def test_an_impression_of_which_more_is_known_takes_its_own_place(world: tuple[Log, str]) -> None:
    log, folder = world
    ranker = Ranker.load(folder)
    _, impressions = max(log.impressions.items(), key=lambda each: len(each[1]))
    begun = [dataclasses.replace(each, watch_s=None, actions=()) for each in impressions]
    late, kept = ranker.encode(impressions, ranker.encode(begun)), ranker.encode(impressions)
    assert late.items == kept.items
    assert late.state_keys == kept.state_keys
    for name, rows in kept.columns.session.items():
        # Of the oldest one kept, the impression before it is gone, so what it was stays as it was told then.
        assert late.columns.session[name][1:].tolist() == rows[1:].tolist()


def test_a_moment_that_is_past_has_the_history_of_then(world: tuple[Log, str], tmp_path: Path) -> None:
    """A user of whom far more has been recorded since; what is kept is kept."""
    log, folder = world
    ranker, store = Ranker.load(folder), fast_store(tmp_path)
    user, impressions = max(log.impressions.items(), key=lambda each: len(each[1]))
    assert len(impressions) > 2 * ranker.card.max_history
    store.put(user, impressions).result(5)
    histories = HistoryCache(ranker, store, 10**6)
    for place in (len(impressions) - 2, len(impressions) // 2, 1):
        now = impressions[place].ts_ms
        past = [each for each in impressions if each.ts_ms <= now]
        asked = RankQuery(user, ["v"], now, past)
        recorded = dataclasses.replace(asked, history=histories.get(user, now))
        assert ranker.rank(recorded) == ranker.rank(asked)
    assert histories.get(user, impressions[0].ts_ms - 1).up_to(impressions[0].ts_ms - 1).items == []
    assert histories.get(user, impressions[-1].ts_ms) is histories.get(user)
    assert histories.misses == 1
    store.close()


def test_places_in_sessions_are_those_of_all_of_the_log_cold_and_warm(world: tuple[Log, str], tmp_path: Path) -> None:
    """A session that is longer than what is read of it, after another one."""
    ranker, store = Ranker.load(world[1]), fast_store(tmp_path)
    warm, last = HistoryCache(ranker, store, 10**6), ranker.card.max_history
    begins = [10**12 + 1000 * number for number in range(60)]
    begins += [begins[-1] + round(1000 * ranker.card.session_gap_s) + 1000 * number for number in range(1, 160)]
    places = [*range(1, 61), *range(1, 160)]
    rows = [1 + bisect_right(POSITION_EDGES, place) for place in places]
    waiting = []
    for count, begin in enumerate(begins, 1):
        waiting.append(Impression("v", begin))
        if count % 13 == 0 or count == len(begins):
            store.put("u", waiting).result(5)
            waiting = []
            for histories in (warm, HistoryCache(ranker, store, 10**6)):
                found = histories.get("u").columns.session[SESSION_POSITION]
                assert found[-last:].tolist() == rows[:count][-last:], count
    store.close()
