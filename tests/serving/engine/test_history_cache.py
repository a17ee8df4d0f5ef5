"""Cache of encoded histories: incremental encoding, eviction and freshness."""

import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.engine.history_cache import SESSION_MARGIN, HistoryCache, size_bytes
from a2gen_rec.serving.stores.base import StoreUnavailable
from a2gen_rec.serving.stores.sqlite import SqliteStore
from tests.helpers.fake_ranker import FakeRanker
from tests.helpers.properties import examples
from tests.helpers.service import fast_store

events = st.lists(st.integers(0, 99), min_size=1, max_size=50)
steps = st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.just("delete") | events), max_size=12)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = fast_store(tmp_path)
    yield store
    store.close()


@examples(25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.sampled_from([0, 4000, 10**6]))
def test_history_matches_the_store_for_any_cache_size(store: SqliteStore, operations: Any, max_bytes: int) -> None:
    """Writes (lists of times), reads (None) and deletions in any order, with all, some or no histories cached."""
    prefix = uuid.uuid4().hex  # of the users of this example
    ranker: Any = FakeRanker("one")
    cache = HistoryCache(ranker, store, max_bytes)
    expected: dict[str, set[int]] = {}
    for name, times in operations:
        user = prefix + name
        if times is None:
            cached = [int(key.split()[0]) for key in cache.get(user).item_at]  # type: ignore[attr-defined]
            last = sorted(expected.get(user, ()))[-cache.max_impressions :]
            assert cached[-len(last) :] == last if last else not cached
            assert set(cached) <= expected.get(user, set())
            assert cache.bytes <= max_bytes
        elif times == "delete":  # possibly by another service
            assert store.delete_user(user).result(5) == len(expected.pop(user, ()))
        else:
            store.put(user, [Impression("v", ts_ms) for ts_ms in times]).result(5)
            expected.setdefault(user, set()).update(times)
    assert cache.bytes == sum(entry.bytes for entry in cache._entries.values())


def test_only_new_impressions_are_encoded(store: SqliteStore) -> None:
    ranker: Any = FakeRanker("one")
    cache = HistoryCache(ranker, store, 10**6)
    bound = ranker.card.max_history + SESSION_MARGIN
    store.put("u", [Impression("v", ts_ms) for ts_ms in range(200)]).result(5)
    assert len(cache.get("u")) == bound == ranker.encoded
    assert cache.get("u") is cache.get("u")
    assert ranker.encoded == bound
    store.put("u", [Impression("w", 999)]).result(5)
    assert list(cache.get("u").item_at.values())[-1] == "w"  # type: ignore[attr-defined]
    assert ranker.encoded == bound + 1
    assert (cache.misses, cache.extended, cache.hits) == (1, 1, 2)


def test_evicts_deleted_users(store: SqliteStore) -> None:
    cache: Any = HistoryCache(FakeRanker("one"), store, 10**6)  # type: ignore[arg-type]
    for user in ("u", "w"):
        store.put(user, [Impression("v", 1)]).result(5)
        cache.get(user)
    store.delete_user("u").result(5)
    cache.evict("u")
    assert (list(cache._entries), cache.bytes) == (["w"], cache._entries["w"].bytes)
    assert len(cache.get("u")) == 0


def test_skips_impressions_unknown_to_the_model(store: SqliteStore) -> None:
    cache: Any = HistoryCache(FakeRanker("one"), store, 10**6)  # type: ignore[arg-type]
    other = Impression("v2", 2, actions=[("other action", None)])
    store.put("u", [Impression("v1", 1), other, Impression("v3", 3)]).result(5)
    with patch.object(cache.ranker, "encode", wraps=cache.ranker.encode) as encode:
        assert list(cache.get("u").item_at.values()) == ["v1", "v3"]
    assert encode.call_count == 2, "one query per attempt, not per impression"


def test_reports_store_failures(store: SqliteStore) -> None:
    cache: Any = HistoryCache(FakeRanker("one"), store, 10**6)  # type: ignore[arg-type]
    store.put("u", [Impression("v1", 1)]).result(5)
    cache.get("u")
    store._writer.execute("DROP TABLE users")
    with pytest.raises(StoreUnavailable):
        cache.get("u")


def test_size_grows_linearly_with_the_history() -> None:
    ranker = FakeRanker("one")
    sizes = [size_bytes(ranker.encode([Impression("v", ts_ms) for ts_ms in range(count)])) for count in (0, 10, 20)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 500
