"""Event store in one SQLite file: no server to run; acknowledged impressions survive a power failure.

Every commit waits for the disk (``synchronous=FULL``), which takes milliseconds. A single thread therefore writes, and
commits all writes that arrived during the previous commit in one transaction.
"""

import queue
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.stores.base import (
    MAX_TIMESTAMP_MS,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreUnavailable,
    deserialize,
    is_successor,
    new_version,
    serialize,
)

APPLICATION_ID = 0xA26E  # in the file header, to identify event stores
SCHEMA_VERSION = 1
MAX_PENDING_WRITES = 4096
MAX_GROUP_COMMIT = 512
BUSY_TIMEOUT_S = 5.0
"""Seconds to wait for another process that writes to the same file."""

_TABLES = (
    """
CREATE TABLE impressions (
    user TEXT NOT NULL,
    ts_ms INTEGER NOT NULL,
    item TEXT NOT NULL,
    change INTEGER NOT NULL,  -- version of the user's history when it was written
    content TEXT NOT NULL,    -- JSON
    PRIMARY KEY (user, ts_ms, item)
) WITHOUT ROWID""",
    "CREATE TABLE users (user TEXT PRIMARY KEY, changes INTEGER NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_GET_VERSION = "SELECT changes FROM users WHERE user = ?"
_NEXT_VERSION = (
    "INSERT INTO users VALUES (?, ? + 1) ON CONFLICT (user) DO UPDATE SET changes = changes + 1 RETURNING changes"
)
_WRITE = "INSERT OR REPLACE INTO impressions VALUES (?, ?, ?, ?, ?)"
# The limit is applied before the filter by version, so that the cost does not grow with the history.
_GET_RECENT = """
SELECT item, ts_ms, content
FROM (SELECT * FROM impressions WHERE user = ? AND ts_ms <= ? ORDER BY ts_ms DESC, item DESC LIMIT ?)
WHERE change > ? ORDER BY ts_ms, item
"""


class _Task(NamedTuple):
    user: str
    rows: list[tuple[int, str, str]] | None
    """Impressions to write; None deletes the user."""
    future: "Future[Any]"


class SqliteStore:
    """:class:`~a2gen_rec.serving.stores.base.EventStore` in a file, created if it does not exist.

    Args:
        file: Local path; several processes may share it.
        max_pages: Maximum size of the file in pages of 4 KiB; 0 for no limit.

    Raises:
        UserError: The file cannot be opened or created, is another database, or has an unsupported version.
    """

    def __init__(self, file: str, max_pages: int = 0) -> None:
        self.file = file
        with suppress(OSError):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        self._writer = _open(file)
        if max_pages:
            self._writer.execute(f"PRAGMA max_page_count = {max_pages}")
        self._reader = _connect(file)
        self._reader.execute("PRAGMA query_only = 1")
        self._read_lock = threading.Lock()
        self._queue: queue.Queue[_Task | None] = queue.Queue(MAX_PENDING_WRITES)
        self._closed = False
        self._thread = threading.Thread(target=self._write_until_closed, name="store", daemon=True)
        self._thread.start()

    def put(self, user: str, impressions: Sequence[Impression]) -> "Future[None]":
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        return self._submit(
            user, [(impression.ts_ms, impression.item, serialize(impression)) for impression in impressions]
        )

    def delete_user(self, user: str) -> "Future[int]":
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`; the deleted content is overwritten in the file."""
        return self._submit(user, None)

    def get_recent(
        self, user: str, limit: int, since_version: int = 0, until_ms: int = MAX_TIMESTAMP_MS
    ) -> tuple[int, list[Impression]]:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        try:
            with self._read_lock:
                # The version is read first: a change between the two reads is read again next time, not missed.
                row = self._reader.execute(_GET_VERSION, [user]).fetchone()
                version = row[0] if row else 0
                after = since_version if is_successor(version, since_version) else 0
                parameters = [user, until_ms, limit, after]
                rows = self._reader.execute(_GET_RECENT, parameters).fetchall() if version != since_version else []
        except sqlite3.Error as error:
            raise _translate_error(error) from error
        return version, [deserialize(*row) for row in rows]

    def sample_users(self, count: int) -> list[str]:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`; the first ones by name."""
        try:
            with self._read_lock:
                rows = self._reader.execute("SELECT user FROM users ORDER BY user LIMIT ?", [count]).fetchall()
        except sqlite3.Error as error:
            raise _translate_error(error) from error
        return [user for (user,) in rows]

    def close(self) -> None:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        with self._read_lock:
            self._reader.close()

    def _submit(self, user: str, rows: list[tuple[int, str, str]] | None) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            if self._closed:
                raise queue.Full
            self._queue.put_nowait(_Task(user, rows, future))
        except queue.Full:
            raise StoreBusy("too many pending writes") from None
        return future

    def _write_until_closed(self) -> None:
        is_open = True
        while is_open:
            tasks = [self._queue.get()]
            with suppress(queue.Empty):
                while len(tasks) < MAX_GROUP_COMMIT:
                    tasks.append(self._queue.get_nowait())
            is_open = None not in tasks
            self._commit([task for task in tasks if task is not None])
        with suppress(sqlite3.Error):
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writer.close()

    def _commit(self, tasks: list[_Task]) -> None:
        failed: StoreError | None = None
        results: list[int | None] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for user, rows, _ in tasks:
                if rows is None:
                    results.append(self._delete(user))
                else:
                    self._write(user, rows)
                    results.append(None)
            self._writer.execute("COMMIT")
            if any(rows is None for _, rows, _ in tasks):
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log still contains the deleted content
        except sqlite3.Error as error:
            failed = _translate_error(error)
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._writer.execute("ROLLBACK")
        for index, task in enumerate(tasks):
            if not task.future.set_running_or_notify_cancel():
                continue
            if failed is None:
                task.future.set_result(results[index])
            else:
                task.future.set_exception(failed)

    def _write(self, user: str, rows: list[tuple[int, str, str]]) -> None:
        (version,) = self._writer.execute(_NEXT_VERSION, [user, new_version()]).fetchone()
        self._writer.executemany(_WRITE, [(user, ts_ms, item, version, text) for ts_ms, item, text in rows])

    def _delete(self, user: str) -> int:
        self._writer.execute("DELETE FROM users WHERE user = ?", [user])
        return self._writer.execute("DELETE FROM impressions WHERE user = ?", [user]).rowcount


def _connect(file: str) -> sqlite3.Connection:
    return sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _open(file: str) -> sqlite3.Connection:
    """Return a connection for writing, and create the schema if necessary."""
    try:
        connection = _connect(file)
        try:
            _create_schema(connection, file)
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
        except BaseException:
            connection.close()  # releases its locks
            raise
    except sqlite3.Error as error:
        raise UserError(f"{file}: cannot be used as an event store ({error})") from error
    return connection


def _create_schema(connection: sqlite3.Connection, file: str) -> None:
    """Create the tables of an empty file, checked and created under one lock: another process may do the same."""
    connection.execute("BEGIN IMMEDIATE")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == tables == 0:
        for statement in _TABLES:
            connection.execute(statement)
    elif application != APPLICATION_ID:
        raise UserError(f"{file}: not an a2gen event store")
    elif version > SCHEMA_VERSION:
        raise UserError(f"{file}: schema version {version} is newer than supported ({SCHEMA_VERSION})")
    connection.execute("COMMIT")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log if it has none. SQLite itself does not wait for other processes here."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _translate_error(error: sqlite3.Error) -> StoreError:
    """Return a StoreError without SQLite's message, which may contain values."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if name == "SQLITE_FULL":
        return StoreFull("event store is full")
    return StoreUnavailable(f"event store error ({name})")
