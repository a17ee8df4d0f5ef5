"""Event stores: durability, atomic writes, incremental reads and deletion."""

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
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.stores.base import EventStore, StoreBusy, StoreFull, StoreUnavailable, is_successor, new_version
from a2gen_rec.serving.stores.factory import open_store
from a2gen_rec.serving.stores.redis import RedisStore
from a2gen_rec.serving.stores.sqlite import MAX_GROUP_COMMIT, SqliteStore
from tests.helpers.properties import examples
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
    """In-memory implementation of the Redis commands that the store uses."""

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
        self.client, self.commands = client, list[Callable[[], Any]]()

    def hset(self, name: str, mapping: dict[str, str]) -> None:
        self.commands.append(lambda: self.client.hashes.setdefault(name, {}).update(mapping))

    def zadd(self, name: str, mapping: dict[str, float]) -> None:
        self.commands.append(lambda: self.client.sets.setdefault(name, {}).update(mapping))

    def hincrby(self, name: str, key: str, by: int) -> None:
        def add() -> None:
            content = self.client.hashes.setdefault(name, {})
            content[key] = str(int(content.get(key, 0)) + by)

        self.commands.append(add)

    def hsetnx(self, name: str, key: str, value: str) -> None:
        self.commands.append(lambda: self.client.hashes.setdefault(name, {}).setdefault(key, value))

    def zcard(self, name: str) -> None:
        self.commands.append(lambda: len(self.client.sets.get(name, {})))

    def delete(self, *names: str) -> None:
        self.commands.append(
            lambda: [kind.pop(name, None) for kind in (self.client.hashes, self.client.sets) for name in names]
        )

    def execute(self) -> list[Any]:
        if self.client.fails:
            raise self.client.fails
        return [command() for command in self.commands]


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventStore]:
    opened = fast_store(tmp_path) if request.param == "sqlite" else RedisStore("redis://", FakeRedis())
    yield opened
    opened.close()


@examples(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(appends, st.integers(1, 5))
def test_reads_match_a_reference_dictionary(store: EventStore, writes: Any, limit: int) -> None:
    """An earlier read plus the changes since then equals a full read."""
    prefix = uuid.uuid4().hex  # users of this example
    expected: dict[str, dict[tuple[int, str], Impression]] = {}
    reads: dict[str, tuple[int, dict[tuple[int, str], Impression]]] = {}
    for name, recorded in writes:
        user = prefix + name
        store.put(user, recorded).result(5)
        expected.setdefault(user, {}).update(
            {(impression.ts_ms, impression.item): impression for impression in recorded}
        )
        since, previous = reads.get(user, (0, {}))
        version, new = store.get_recent(user, limit, since)
        assert version > since
        reads[user] = version, previous | {(impression.ts_ms, impression.item): impression for impression in new}
        assert store.get_recent(user, limit, version) == (version, [])
    for user, content in expected.items():
        newest = [content[key] for key in sorted(content)][-limit:]
        assert repr(store.get_recent(user, limit)[1]) == repr(newest), "1 and 1.0 differ"
        for until in (0, 3):
            earlier = [content[key] for key in sorted(content) if key[0] <= until][-limit:]
            assert store.get_recent(user, limit, until_ms=until)[1] == earlier
        assert [reads[user][1][key] for key in sorted(reads[user][1])][-limit:] == newest
    assert store.get_recent("unheard of", limit) == (0, [])


def test_sample_users(store: EventStore) -> None:
    assert store.sample_users(9) == []
    users = ["u2", "a:{b}", "u1", "ü"]
    for user in users * 2:
        store.put(user, [Impression("v1", 5)]).result(5)
    assert store.sample_users(9) == sorted(users)
    assert len(store.sample_users(3)) == 3
    assert set(store.sample_users(3)) < set(users)


def test_deleted_user_starts_a_new_history(store: EventStore) -> None:
    user, other = "a:{b}", "a"
    for _ in range(3):
        recorded = [Impression("v1", 5, actions=[]), Impression("v2", 6, actions=[])]
        for name in (user, other):
            store.put(name, recorded).result(5)
        previous, _ = store.get_recent(user, 9)
        assert store.delete_user(user).result(5) == 2
        assert store.get_recent(user, 9) == store.get_recent(user, 9, previous) == (0, [])
        assert store.sample_users(9) == [other]
        assert store.delete_user(user).result(5) == 0
        store.put(user, recorded[1:]).result(5)  # the same number of changes as before
        version, impressions_read = store.get_recent(user, 9, previous)
        assert impressions_read == recorded[1:]
        assert version != previous
        assert not is_successor(version, previous)
        store.delete_user(user).result(5)
    assert store.get_recent(other, 9)[1] == recorded


def test_versions_of_a_deleted_history_have_no_successor() -> None:
    before = new_version()
    assert is_successor(before + 2, before + 1)
    assert is_successor(2, 1), "versions of stores without deletions"
    assert not is_successor(0, 1)
    assert not is_successor(new_version() + 1, before + 1)
    assert not is_successor(before + 1, 1)


def test_deleted_content_is_removed_from_the_file(tmp_path: Path) -> None:
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


def test_acknowledged_impressions_survive_reopening(tmp_path: Path) -> None:
    file = str(tmp_path / "created" / "events.db")
    store = SqliteStore(file)
    writes = [store.put(f"u{number % 3}", [Impression(f"v{number}", number)]) for number in range(50)]
    store.close()
    assert all(write.done() and write.exception() is None for write in writes), "closing completes pending writes"
    with pytest.raises(StoreBusy):
        store.put("u0", [Impression("v", 0)])
    again = SqliteStore(file)
    assert [len(again.get_recent(f"u{number}", 99)[1]) for number in range(3)] == [17, 17, 16]
    again.close()


def test_pending_writes_share_a_commit(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"))
    commits, release, started = [], threading.Event(), threading.Event()

    def trace(statement: str) -> None:
        if statement == "COMMIT":
            commits.append(statement)
        if statement.startswith("BEGIN"):
            started.set()
            release.wait(5)

    store._writer.set_trace_callback(trace)
    first = store.put("u", [Impression("v", 0)])
    assert started.wait(5)
    others = [store.put("u", [Impression("v", number)]) for number in range(1, MAX_GROUP_COMMIT + 1)]
    assert not first.done(), "acknowledged only after the commit"
    release.set()
    wait([first, *others], 10)
    assert len(commits) == 2
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


def test_full_store_stays_readable_and_recovers(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "events.db"), max_pages=8)
    recorded = 0
    while (failed := store.put("u", [Impression("v" * 200, recorded)]).exception(5)) is None:
        recorded += 1
    assert isinstance(failed, StoreFull)
    assert recorded > 10
    assert [impression.ts_ms for impression in store.get_recent("u", 99_999)[1]] == list(range(recorded)), (
        "writes are atomic"
    )
    store._writer.execute("PRAGMA max_page_count = 1000")
    store.put("u", [Impression("v", recorded)]).result(5)
    assert len(store.get_recent("u", 99_999)[1]) == recorded + 1
    store.close()


def test_rejects_files_that_are_no_event_store(tmp_path: Path) -> None:
    def check_rejected(file: Path, message: str) -> None:
        before = file.read_bytes() if file.is_file() else b""
        with pytest.raises(UserError, match=message) as error:
            open_store(str(file))
        assert str(file) in str(error.value)
        assert (file.read_bytes() if file.is_file() else b"") == before, "the file is unchanged"

    text = tmp_path / "text"
    text.write_text("no database " * 100)
    check_rejected(text, "not a database")
    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    check_rejected(other, "not an a2gen event store")
    newer = tmp_path / "newer.db"
    SqliteStore(str(newer)).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    check_rejected(newer, "unsupported schema version 3, expected 2")
    check_rejected(tmp_path, "cannot be used as an event store")
    with pytest.raises(UserError, match="must be a local file path"):
        open_store("s3://bucket/events")
    with pytest.raises(UserError, match="does not respond"):
        open_store("redis://127.0.0.1:1/0")


def test_interrupted_creation_is_repeated(tmp_path: Path) -> None:
    file = tmp_path / "events.db"
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA journal_mode = WAL")  # writes the first page of the file
    connection.close()
    assert file.stat().st_size > 0
    store = SqliteStore(str(file))
    store.put("u", [Impression("v", 1)]).result(5)
    assert [impression.ts_ms for impression in store.get_recent("u", 9)[1]] == [1]
    store.close()


def test_concurrent_creation_of_one_file(tmp_path: Path) -> None:
    """Threads stand for processes: SQLite locks files between connections."""
    for number in range(10):
        file, barrier = str(tmp_path / f"{number}.db"), threading.Barrier(4)

        def opened(file: str = file, barrier: threading.Barrier = barrier) -> SqliteStore:
            barrier.wait(5)
            return SqliteStore(file)

        with ThreadPoolExecutor(4) as threads:
            stores = [future.result(10) for future in [threads.submit(opened) for _ in range(4)]]
        for index, store in enumerate(stores):
            store.put("u", [Impression("v", index)]).result(5)
        assert [impression.ts_ms for impression in stores[0].get_recent("u", 9)[1]] == [0, 1, 2, 3]
        for store in stores:
            store.close()


def test_errors_of_a_damaged_store_name_no_user(tmp_path: Path) -> None:
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


def test_redis_circuit_breaker(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.skipif(
    "A2GEN_TEST_REDIS" not in os.environ, reason="set A2GEN_TEST_REDIS=redis://… to test with a real server"
)
def test_a_real_redis() -> None:
    store = open_store(os.environ["A2GEN_TEST_REDIS"])
    user = os.urandom(8).hex()
    store.put(user, [Impression("v1", 2, 1.5, [("like", None)], {"tab": "a"}), Impression("v0", 1)]).result(5)
    store.put(user, [Impression("v1", 2, 2.5)]).result(5)
    version, impressions_read = store.get_recent(user, 1)
    assert impressions_read == [Impression("v1", 2, 2.5)]
    assert store.get_recent(user, 9, version) == (version, [])
    assert store.delete_user(user).result(5) == 2
    assert store.get_recent(user, 9, version) == (0, [])
    store.close()
