"""Impressions outlast the process, and are read as they were recorded."""

import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.stores.base import EventStore, StoreBusy, StoreFull, StoreUnavailable, is_successor, new_version
from a2gen_rec.serving.stores.factory import open_store
from a2gen_rec.serving.stores.redis import RedisStore
from a2gen_rec.serving.stores.sqlite import MAX_GROUP_COMMIT, SqliteStore
from tests.helpers.service import fast_store

seconds = st.none() | st.floats(0, 1e6)
values = st.none() | st.text(max_size=5) | st.integers(-(10**15), 10**15) | st.floats(-1e9, 1e9)
impressions = st.builds(
    Impression,
    item=st.sampled_from(["v1", "v2", "v:3", "ü", "v\0"]),
    ts_ms=st.integers(0, 6),
    watch_s=seconds,
    actions=st.lists(st.tuples(st.sampled_from(["like", "follow"]), seconds), max_size=2),
    features=st.dictionaries(st.text(min_size=1, max_size=3), values, max_size=2),
)
appends = st.lists(st.tuples(st.sampled_from(["a", "b", "a b", "ü"]), st.lists(impressions, min_size=1, max_size=4)))


class FakeRedis:
    """The few commands that are asked of Redis, as its documentation has them."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[str, str]] = {}
        self.sets: dict[str, dict[str, float]] = {}
        self.fails: Exception | None = None

    def ping(self) -> bool:
        return True

    def close(self) -> None: ...

    def pipeline(self, transaction: bool) -> "FakePipeline":
        assert transaction
        return FakePipeline(self)

    def hget(self, name: str, key: str) -> str | None:
        if self.fails:
            raise self.fails
        return self.hashes.get(name, {}).get(key)

    def scan(self, cursor: int, match: str, count: int) -> tuple[int, list[str]]:
        return 0, [name for name in self.sets if fnmatch(name, match)][:count]

    def hmget(self, name: str, keys: list[str]) -> list[str | None]:
        return [self.hashes.get(name, {}).get(key) for key in keys]

    def zrevrangebyscore(self, name: str, max: float, min: str, start: int, num: int) -> list[str]:
        ordered = sorted(self.sets.get(name, {}).items(), key=lambda pair: (pair[1], pair[0].encode()), reverse=True)
        return [member for member, score in ordered if float(min) <= score <= max][start : start + num]


class FakePipeline:
    def __init__(self, client: FakeRedis) -> None:
        self.client, self.todo = client, list[Callable[[], Any]]()

    def hset(self, name: str, mapping: dict[str, str]) -> None:
        self.todo.append(lambda: self.client.hashes.setdefault(name, {}).update(mapping))

    def zadd(self, name: str, mapping: dict[str, float]) -> None:
        self.todo.append(lambda: self.client.sets.setdefault(name, {}).update(mapping))

    def hincrby(self, name: str, key: str, by: int) -> None:
        def add() -> None:
            content = self.client.hashes.setdefault(name, {})
            content[key] = str(int(content.get(key, 0)) + by)

        self.todo.append(add)

    def hsetnx(self, name: str, key: str, value: str) -> None:
        self.todo.append(lambda: self.client.hashes.setdefault(name, {}).setdefault(key, value))

    def zcard(self, name: str) -> None:
        self.todo.append(lambda: len(self.client.sets.get(name, {})))

    def delete(self, *names: str) -> None:
        self.todo.append(
            lambda: [kind.pop(name, None) for kind in (self.client.hashes, self.client.sets) for name in names]
        )

    def execute(self) -> list[Any]:
        if self.client.fails:
            raise self.client.fails
        return [each() for each in self.todo]


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventStore]:
    opened = fast_store(tmp_path) if request.param == "sqlite" else RedisStore("redis://", FakeRedis())
    yield opened
    opened.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(appends, st.integers(1, 5))
def test_the_last_impressions_are_read_as_recorded(store: EventStore, given: Any, last: int) -> None:
    """Against a dictionary; and what has changed since a reading, with what was read then, is all there is to know."""
    world = uuid.uuid4().hex  # users of this example
    expected: dict[str, dict[tuple[int, str], Impression]] = {}
    seen: dict[str, tuple[int, dict[tuple[int, str], Impression]]] = {}
    for name, recorded in given:
        user = world + name
        store.put(user, recorded).result(5)
        expected.setdefault(user, {}).update({(each.ts_ms, each.item): each for each in recorded})
        since, known = seen.get(user, (0, {}))
        changes, fresh = store.get_recent(user, last, since)
        assert changes > since
        seen[user] = changes, known | {(each.ts_ms, each.item): each for each in fresh}
        assert store.get_recent(user, last, changes) == (changes, [])
    for user, content in expected.items():
        newest = [content[key] for key in sorted(content)][-last:]
        assert repr(store.get_recent(user, last)[1]) == repr(newest), "1 and 1.0 are two"
        for until in (0, 3):
            earlier = [content[key] for key in sorted(content) if key[0] <= until][-last:]
            assert store.get_recent(user, last, until_ms=until)[1] == earlier
        assert [seen[user][1][key] for key in sorted(seen[user][1])][-last:] == newest
    assert store.get_recent("unheard of", last) == (0, [])


def test_some_users_are_those_of_whom_something_is_recorded(store: EventStore) -> None:
    assert store.sample_users(9) == []
    users = ["u2", "a:{b}", "u1", "ü"]
    for user in users * 2:
        store.put(user, [Impression("v1", 5)]).result(5)
    assert store.sample_users(9) == sorted(users)
    assert len(store.sample_users(3)) == 3
    assert set(store.sample_users(3)) < set(users)


def test_a_user_who_is_forgotten_begins_anew(store: EventStore) -> None:
    user, other = "a:{b}", "a"
    for _ in range(3):
        recorded = [Impression("v1", 5, actions=[]), Impression("v2", 6, actions=[])]
        for each in (user, other):
            store.put(each, recorded).result(5)
        former, _ = store.get_recent(user, 9)
        assert store.delete_user(user).result(5) == 2
        assert store.get_recent(user, 9) == store.get_recent(user, 9, former) == (0, [])
        assert store.sample_users(9) == [other]
        assert store.delete_user(user).result(5) == 0
        store.put(user, recorded[1:]).result(5)  # as many changes as before
        changes, found = store.get_recent(user, 9, former)
        assert found == recorded[1:]
        assert changes != former
        assert not is_successor(changes, former)
        store.delete_user(user).result(5)
    assert store.get_recent(other, 9)[1] == recorded


def test_no_number_follows_that_of_a_past_which_is_gone() -> None:
    before = new_version()
    assert is_successor(before + 2, before + 1)
    assert is_successor(2, 1), "of stores made before users could be forgotten"
    assert not is_successor(0, 1)
    assert not is_successor(new_version() + 1, before + 1)
    assert not is_successor(before + 1, 1)


def test_nothing_of_a_forgotten_user_is_left_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    store = SqliteStore(str(file))
    for number in range(300):
        store.put(f"user{number % 3}", [Impression(f"item{number % 3} {number}", number, 1.5)])
    kept = store.put("user1", [Impression("item1", 1)])
    assert kept.exception(5) is None

    def holds(text: bytes) -> bool:
        return any(text in part.read_bytes() for part in tmp_path.iterdir())

    assert holds(b"user2")
    assert holds(b"item2")
    assert store.delete_user("user2").result(5) == 100
    assert not holds(b"user2")
    assert not holds(b"item2")
    assert len(store.get_recent("user1", 999)[1]) == 101
    store.close()


def test_what_was_acknowledged_is_there_after_closing_and_opening(tmp_path: Path) -> None:
    file = str(tmp_path / "made" / "events.db")
    store = SqliteStore(file)
    waiting = [store.put(f"u{number % 3}", [Impression(f"v{number}", number)]) for number in range(50)]
    store.close()
    assert all(each.done() and each.exception() is None for each in waiting), "closing records what waits"
    with pytest.raises(StoreBusy):
        store.put("u0", [Impression("v", 0)])
    again = SqliteStore(file)
    assert [len(again.get_recent(f"u{number}", 99)[1]) for number in range(3)] == [17, 17, 16]
    again.close()


def test_events_that_wait_share_a_commit(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    commits, held, began = [], threading.Event(), threading.Event()

    def trace(statement: str) -> None:
        if statement == "COMMIT":
            commits.append(statement)
        if statement.startswith("BEGIN"):
            began.set()
            held.wait(5)

    store._writer.set_trace_callback(trace)
    first = store.put("u", [Impression("v", 0)])
    assert began.wait(5)
    others = [store.put("u", [Impression("v", number)]) for number in range(1, MAX_GROUP_COMMIT + 1)]
    assert not first.done(), "nothing is acknowledged before it is committed"
    held.set()
    wait([first, *others], 10)
    assert len(commits) == 2
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


def test_a_full_store_says_so_reads_on_and_records_again_once_there_is_room(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"), max_pages=8)
    recorded = 0
    while (failed := store.put("u", [Impression("v" * 200, recorded)]).exception(5)) is None:
        recorded += 1
    assert isinstance(failed, StoreFull)
    assert recorded > 10
    assert [each.ts_ms for each in store.get_recent("u", 99_999)[1]] == list(range(recorded)), "no half of an append"
    store._writer.execute("PRAGMA max_page_count = 1000")
    store.put("u", [Impression("v", recorded)]).result(5)
    assert len(store.get_recent("u", 99_999)[1]) == recorded + 1
    store.close()


def test_what_is_no_store_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(file: Path, why: str) -> None:
        before = file.read_bytes() if file.is_file() else b""
        with pytest.raises(UserError, match=why) as error:
            open_store(str(file))
        assert str(file) in str(error.value)
        assert (file.read_bytes() if file.is_file() else b"") == before, "it stays as it is"

    text = tmp_path / "text"
    text.write_text("no database " * 100)
    refused(text, "not a database")
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    refused(other, "not an a2gen event store")
    newer = tmp_path / "newer.db"
    SqliteStore(str(newer)).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    refused(newer, r"schema version 2 is newer than supported \(1\)")
    refused(tmp_path, "cannot be used as an event store")
    with pytest.raises(UserError, match="must be a local file path"):
        open_store("s3://bucket/events")
    with pytest.raises(UserError, match="does not respond"):
        open_store("redis://127.0.0.1:1/0")


def test_a_store_that_was_stopped_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA journal_mode = WAL")  # which writes the file's first page
    connection.close()
    assert file.stat().st_size > 0
    store = SqliteStore(str(file))
    store.put("u", [Impression("v", 1)]).result(5)
    assert [each.ts_ms for each in store.get_recent("u", 9)[1]] == [1]
    store.close()


def test_one_new_file_may_be_opened_by_several_at_once(tmp_path: Path) -> None:
    """Threads for processes: what locks a file lies between connections."""
    for number in range(10):
        file, together = str(tmp_path / f"{number}.db"), threading.Barrier(4)

        def opened(file: str = file, together: threading.Barrier = together) -> SqliteStore:
            together.wait(5)
            return SqliteStore(file)

        with ThreadPoolExecutor(4) as threads:
            stores = [each.result(10) for each in [threads.submit(opened) for _ in range(4)]]
        for place, store in enumerate(stores):
            store.put("u", [Impression("v", place)]).result(5)
        assert [each.ts_ms for each in stores[0].get_recent("u", 9)[1]] == [0, 1, 2, 3]
        for store in stores:
            store.close()


def test_a_damaged_store_is_unavailable_without_naming_a_user(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    store = SqliteStore(str(file))
    store.put("secret", [Impression("v", 0)]).result(5)
    store._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store._writer.execute("DROP TABLE users")
    with pytest.raises(StoreUnavailable) as error:
        store.get_recent("secret", 5)
    assert "secret" not in str(error.value)
    with pytest.raises(StoreUnavailable):
        store.put("secret", [Impression("v", 1)]).result(5)
    store.close()


def test_redis_that_does_not_answer_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    import redis

    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    client = FakeRedis()
    store = RedisStore("redis://", client)
    client.fails = redis.ConnectionError("secret")
    with pytest.raises(StoreUnavailable, match=r"\(ConnectionError\)"):
        store.get_recent("u", 5)
    client.fails = None
    with pytest.raises(StoreUnavailable, match="timed out"):
        store.get_recent("u", 5)
    now = 102.0
    assert store.get_recent("u", 5) == (0, [])
    client.fails = redis.OutOfMemoryError("secret")
    with pytest.raises(StoreFull):
        store.put("u", [Impression("v", 0)]).result(5)
    store.close()


@pytest.mark.skipif("A2GEN_TEST_REDIS" not in os.environ, reason="no Redis: A2GEN_TEST_REDIS=redis://…")
def test_a_real_redis() -> None:
    store = open_store(os.environ["A2GEN_TEST_REDIS"])
    user = os.urandom(8).hex()
    store.put(user, [Impression("v1", 2, 1.5, [("like", None)], {"tab": "a"}), Impression("v0", 1)]).result(5)
    store.put(user, [Impression("v1", 2, 2.5)]).result(5)
    changes, found = store.get_recent(user, 1)
    assert found == [Impression("v1", 2, 2.5)]
    assert store.get_recent(user, 9, changes) == (changes, [])
    assert store.delete_user(user).result(5) == 2
    assert store.get_recent(user, 9, changes) == (0, [])
    store.close()
