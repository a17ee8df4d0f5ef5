"""Recorded pasts are encoded once, forgotten by need, and never out of date."""

import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.engine.history_cache import SESSION_MARGIN, HistoryCache, size_bytes
from a2gen_rec.serving.stores.base import StoreUnavailable
from a2gen_rec.serving.stores.sqlite import SqliteStore
from tests.helpers.fake_ranker import FakeRanker
from tests.helpers.service import fast_store

events = st.lists(st.integers(0, 99), min_size=1, max_size=50)
steps = st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.just("forget") | events), max_size=12)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = fast_store(tmp_path)
    yield store
    store.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.sampled_from([0, 4000, 10**6]))
def test_a_history_is_what_is_recorded_whatever_is_entries(store: SqliteStore, given: Any, max_bytes: int) -> None:
    """Appends (of moments), questions (None) and deletions in any order; kept, dropped at once, or some of both."""
    world = uuid.uuid4().hex  # users of this example
    ranker: Any = FakeRanker("one")
    histories = HistoryCache(ranker, store, max_bytes)
    expected: dict[str, set[int]] = {}
    for name, moments in given:
        user = world + name
        if moments is None:
            found = [int(key.split()[0]) for key in histories.get(user).item_at]  # type: ignore[attr-defined]
            last = sorted(expected.get(user, ()))[-histories.max_impressions :]
            assert found[-len(last) :] == last if last else not found
            assert set(found) <= expected.get(user, set())
            assert histories.bytes <= max_bytes
        elif moments == "forget":  # maybe by another service
            assert store.delete_user(user).result(5) == len(expected.pop(user, ()))
        else:
            store.put(user, [Impression("v", each) for each in moments]).result(5)
            expected.setdefault(user, set()).update(moments)
    assert histories.bytes == sum(kept.bytes for kept in histories._entries.values())


def test_only_what_is_new_is_encoded(store: SqliteStore) -> None:
    ranker: Any = FakeRanker("one")
    histories = HistoryCache(ranker, store, 10**6)
    bound = ranker.card.max_history + SESSION_MARGIN
    store.put("u", [Impression("v", each) for each in range(200)]).result(5)
    assert len(histories.get("u")) == bound == ranker.encoded
    assert histories.get("u") is histories.get("u")
    assert ranker.encoded == bound
    store.put("u", [Impression("w", 999)]).result(5)
    assert list(histories.get("u").item_at.values())[-1] == "w"  # type: ignore[attr-defined]
    assert ranker.encoded == bound + 1
    assert (histories.misses, histories.extended, histories.hits) == (1, 1, 2)


def test_a_user_who_is_forgotten_leaves_memory_at_once(store: SqliteStore) -> None:
    histories: Any = HistoryCache(FakeRanker("one"), store, 10**6)  # type: ignore[arg-type]
    for user in ("u", "w"):
        store.put(user, [Impression("v", 1)]).result(5)
        histories.get(user)
    store.delete_user("u").result(5)
    histories.evict("u")
    assert (list(histories._entries), histories.bytes) == (["w"], histories._entries["w"].bytes)
    assert len(histories.get("u")) == 0


def test_what_the_model_cannot_read_is_left_out(store: SqliteStore) -> None:
    histories: Any = HistoryCache(FakeRanker("one"), store, 10**6)  # type: ignore[arg-type]
    other = Impression("v2", 2, actions=[("of another log", None)])
    store.put("u", [Impression("v1", 1), other, Impression("v3", 3)]).result(5)
    with patch.object(histories.ranker, "encode", wraps=histories.ranker.encode) as encode:
        assert list(histories.get("u").item_at.values()) == ["v1", "v3"]
    assert encode.call_count == 2, "a query each: not one for every impression"


def test_a_store_that_cannot_be_read_is_told(store: SqliteStore) -> None:
    histories: Any = HistoryCache(FakeRanker("one"), store, 10**6)  # type: ignore[arg-type]
    store.put("u", [Impression("v1", 1)]).result(5)
    histories.get("u")
    store._writer.execute("DROP TABLE users")
    with pytest.raises(StoreUnavailable):
        histories.get("u")


def test_the_memory_of_a_history_grows_with_it() -> None:
    ranker = FakeRanker("one")
    sizes = [size_bytes(ranker.encode([Impression("v", each) for each in range(count)])) for count in (0, 10, 20)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 500
