"""Event store in one SQLite file: no server to run; acknowledged impressions survive a power failure.

Every commit waits for the disk (``synchronous=FULL``), which takes milliseconds. A single thread therefore writes, and
commits all writes that arrived during the previous commit in one transaction.

Nothing is acknowledged unless the files at the path are those that SQLite has open. Deleted content remains in the
write-ahead log until a checkpoint, which waits for the transactions of other readers. No write waits for it: the
checkpoint is tried after each commit and at each tick until it succeeds.
"""

import logging
import os
import queue
import secrets
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
from a2gen_rec.serving.stores.sqlite_files import StoreFiles, StoreOverwritten

APPLICATION_ID = 0xA26E  # in the file header, to identify event stores
SCHEMA_VERSION = 2
MAX_PENDING_WRITES = 4096
MAX_GROUP_COMMIT = 512
BUSY_TIMEOUT_S = 5.0
"""Seconds to wait for another process that writes to the same file."""
TICK_S = 1.0
"""Seconds after which an idle store checks its files, and tries to overwrite deleted content."""

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
    "CREATE TABLE store (id TEXT NOT NULL, commits INTEGER NOT NULL)",  # one row, see sqlite_files.py
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_GET_VERSION = "SELECT changes FROM users WHERE user = ?"
_NEXT_VERSION = (
    "INSERT INTO users VALUES (?, ? + 1) ON CONFLICT (user) DO UPDATE SET changes = changes + 1 RETURNING changes"
)
_COUNT_COMMIT = "UPDATE store SET commits = commits + 1"
_WRITE = "INSERT OR REPLACE INTO impressions VALUES (?, ?, ?, ?, ?)"
# The limit is applied before the filter by version, so that the cost does not grow with the history.
_GET_RECENT = """
SELECT item, ts_ms, content
FROM (SELECT * FROM impressions WHERE user = ? AND ts_ms <= ? ORDER BY ts_ms DESC, item DESC LIMIT ?)
WHERE change > ? ORDER BY ts_ms, item
"""

log = logging.getLogger(__name__)


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
        self._is_available = True
        self._is_overwritten = False
        self._empty_log(None)  # may contain deleted content of a previous process, or the tables
        self._files = _identify(self._writer, file)
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
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        return self._submit(user, None)

    @property
    def is_overwritten(self) -> bool:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`; false while other readers keep the log in use."""
        return self._is_overwritten

    def check(self) -> None:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        self._files.check()

    def get_recent(
        self, user: str, limit: int, since_version: int = 0, until_ms: int = MAX_TIMESTAMP_MS
    ) -> tuple[int, list[Impression]]:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        self._files.check()
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
        self._files.check()
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
            tasks: list[_Task | None] = []
            with suppress(queue.Empty):
                tasks.append(self._queue.get(timeout=TICK_S))
                while len(tasks) < MAX_GROUP_COMMIT:
                    tasks.append(self._queue.get_nowait())
            is_open = None not in tasks
            self._commit([task for task in tasks if task is not None])
        self._close_writer()

    def _commit(self, tasks: list[_Task]) -> None:
        failed: StoreError | None = None
        results: list[int | None] = []
        try:
            self._files.check()
            if tasks:
                results = self._write_all(tasks)
                self._files.check()  # moved meanwhile: nothing is acknowledged
        except sqlite3.Error as error:
            failed = _translate_error(error)
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._writer.execute("ROLLBACK")
        except StoreUnavailable as error:
            failed = error
        self._log_availability(failed)
        deletions = [index for index, task in enumerate(tasks) if task.rows is None]
        _resolve([task for task in tasks if task.rows is not None], [], failed)
        self._is_overwritten &= not deletions
        if not self._is_overwritten or isinstance(failed, StoreUnavailable):
            self._empty_log(failed)
        _resolve([tasks[index] for index in deletions], [results[index] for index in deletions if results], failed)

    def _write_all(self, tasks: list[_Task]) -> list[int | None]:
        """Write in one transaction; return the number of deleted impressions of each deletion."""
        results: list[int | None] = []
        self._writer.execute("BEGIN IMMEDIATE")
        for user, rows, _ in tasks:
            if rows is None:
                results.append(self._delete(user))
            else:
                self._write(user, rows)
                results.append(None)
        self._writer.execute(_COUNT_COMMIT)
        self._writer.execute("COMMIT")
        return results

    def _empty_log(self, failed: StoreError | None) -> None:
        """Try to copy the log into the database file and to truncate it, without waiting for readers.

        This overwrites deleted content. It also completes a file that was moved, and keeps the log from being applied
        to its replacement; but the log of a file that was overwritten must not be copied into it.
        """
        if isinstance(failed, StoreOverwritten):
            return
        with suppress(sqlite3.Error):
            self._writer.execute("PRAGMA busy_timeout = 0")
            try:
                ((is_busy, _, _),) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._is_overwritten = not is_busy and failed is None
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_TIMEOUT_S)}")

    def _close_writer(self) -> None:
        is_overwritten = self._is_file_overwritten()
        if is_overwritten:
            time.sleep(TICK_S)  # in which another process would finish copying its log
            is_overwritten = self._is_file_overwritten()
        if is_overwritten:
            with suppress(OSError):
                os.truncate(self._files.log, 0)  # otherwise SQLite would copy the log into the new content
        else:
            self._empty_log(None)
        self._writer.close()

    def _is_file_overwritten(self) -> bool:
        try:
            self._files.check()
        except StoreUnavailable as error:
            return isinstance(error, StoreOverwritten)
        return False

    def _log_availability(self, failed: StoreError | None) -> None:
        is_available = not isinstance(failed, StoreUnavailable)
        if is_available != self._is_available:
            self._is_available = is_available
            log.error("%s", failed) if failed else log.warning("event store available again")

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
        connection.execute("INSERT INTO store VALUES (?, 0)", [secrets.token_hex(8)])
    elif application != APPLICATION_ID:
        raise UserError(f"{file}: not an a2gen event store")
    elif version != SCHEMA_VERSION:
        raise UserError(f"{file}: unsupported schema version {version}, expected {SCHEMA_VERSION}")
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


def _identify(connection: sqlite3.Connection, file: str) -> StoreFiles:
    """Return the identity of the open files; closes the connection on failure."""
    try:
        (store_id,) = connection.execute("SELECT id FROM store").fetchone()
        files = StoreFiles(file, store_id)
        files.check()
    except (OSError, sqlite3.Error, StoreUnavailable) as error:
        connection.close()
        raise UserError(f"{file}: cannot be used as an event store ({error})") from error
    return files


def _resolve(tasks: Sequence[_Task], results: Sequence[Any], failed: StoreError | None) -> None:
    """Complete the futures of writes; ``results`` may be empty."""
    for index, task in enumerate(tasks):
        if not task.future.set_running_or_notify_cancel():
            continue
        if failed is None:
            task.future.set_result(results[index] if results else None)
        else:
            task.future.set_exception(failed)


def _translate_error(error: sqlite3.Error) -> StoreError:
    """Return a StoreError without SQLite's message, which may contain values."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if name == "SQLITE_FULL":
        return StoreFull("event store is full")
    return StoreUnavailable(f"event store error ({name})")
