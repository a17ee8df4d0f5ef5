"""Impressions in one SQLite file: no server to run, and what was acknowledged outlasts a power cut.

Every commit waits for the disk (``synchronous=FULL``), which takes milliseconds; so one thread writes, and all that
came while it waited goes into its next transaction.
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

APPLICATION = 0xA26E  # in the file's header, by which it is told from other databases
SCHEMA_VERSION = 1
MAX_WAITING = 4096
MAX_GROUP_COMMIT = 512
BUSY_TIMEOUT_S = 5.0
"""For which another process that writes to the same file is waited for."""

_TABLES = (
    """
CREATE TABLE impressions (
    user TEXT NOT NULL,
    ts_ms INTEGER NOT NULL,
    item TEXT NOT NULL,
    change INTEGER NOT NULL,  -- the number of the user's changes when it was recorded
    content TEXT NOT NULL,    -- JSON
    PRIMARY KEY (user, ts_ms, item)
) WITHOUT ROWID""",
    "CREATE TABLE users (user TEXT PRIMARY KEY, changes INTEGER NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_CHANGES = "SELECT changes FROM users WHERE user = ?"
_CHANGE = "INSERT INTO users VALUES (?, ? + 1) ON CONFLICT (user) DO UPDATE SET changes = changes + 1 RETURNING changes"
_RECORD = "INSERT OR REPLACE INTO impressions VALUES (?, ?, ?, ?, ?)"
# The bound on what is looked at comes before the question what is new of it: a long past costs nothing.
_RECENT = """
SELECT item, ts_ms, content
FROM (SELECT * FROM impressions WHERE user = ? AND ts_ms <= ? ORDER BY ts_ms DESC, item DESC LIMIT ?)
WHERE change > ? ORDER BY ts_ms, item
"""


class _Task(NamedTuple):
    user: str
    rows: list[tuple[int, str, str]] | None
    """To record; None forgets the user."""
    done: "Future[Any]"


class SqliteStore:
    """A :class:`~a2gen_rec.serving.stores.base.Store` in a file, made if absent.

    Args:
        file: local; several processes may share it.
        max_pages: bound on its size, in pages of 4 KiB; 0 sets none.

    Raises:
        UserError: the file cannot be opened or made, is another database, or a newer store.
    """

    def __init__(self, file: str, max_pages: int = 0) -> None:
        self.file = file
        with suppress(OSError):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        self._writing = _open(file)
        if max_pages:
            self._writing.execute(f"PRAGMA max_page_count = {max_pages}")
        self._reading = _connect(file)
        self._reading.execute("PRAGMA query_only = 1")
        self._read_lock = threading.Lock()
        self._waiting: queue.Queue[_Task | None] = queue.Queue(MAX_WAITING)
        self._closed = False
        self._thread = threading.Thread(target=self._write_until_closed, name="store", daemon=True)
        self._thread.start()

    def put(self, user: str, impressions: Sequence[Impression]) -> "Future[None]":
        """See :class:`~a2gen_rec.serving.stores.base.Store`."""
        return self._later(user, [(each.ts_ms, each.item, serialize(each)) for each in impressions])

    def delete_user(self, user: str) -> "Future[int]":
        """See :class:`~a2gen_rec.serving.stores.base.Store`; what was there is overwritten in the file."""
        return self._later(user, None)

    def get_recent(
        self, user: str, last: int, since: int = 0, until_ms: int = MAX_TIMESTAMP_MS
    ) -> tuple[int, list[Impression]]:
        """See :class:`~a2gen_rec.serving.stores.base.Store`."""
        try:
            with self._read_lock:
                # Changes before impressions: one that comes between the two is read again next time, not missed.
                row = self._reading.execute(_CHANGES, [user]).fetchone()
                changes = row[0] if row else 0
                known = since if is_successor(changes, since) else 0
                asked = [user, until_ms, last, known]
                rows = self._reading.execute(_RECENT, asked).fetchall() if changes != since else []
        except sqlite3.Error as error:
            raise _translate_error(error) from error
        return changes, [deserialize(*row) for row in rows]

    def sample_users(self, count: int) -> list[str]:
        """See :class:`~a2gen_rec.serving.stores.base.Store`; the first by name."""
        try:
            with self._read_lock:
                rows = self._reading.execute("SELECT user FROM users ORDER BY user LIMIT ?", [count]).fetchall()
        except sqlite3.Error as error:
            raise _translate_error(error) from error
        return [user for (user,) in rows]

    def close(self) -> None:
        """See :class:`~a2gen_rec.serving.stores.base.Store`."""
        if self._closed:
            return
        self._closed = True
        self._waiting.put(None)
        self._thread.join()
        with self._read_lock:
            self._reading.close()

    def _later(self, user: str, rows: list[tuple[int, str, str]] | None) -> "Future[Any]":
        done: Future[Any] = Future()
        try:
            if self._closed:
                raise queue.Full
            self._waiting.put_nowait(_Task(user, rows, done))
        except queue.Full:
            raise StoreBusy("too many impressions wait to be recorded") from None
        return done

    def _write_until_closed(self) -> None:
        is_open = True
        while is_open:
            together = [self._waiting.get()]
            with suppress(queue.Empty):
                while len(together) < MAX_GROUP_COMMIT:
                    together.append(self._waiting.get_nowait())
            is_open = None not in together
            self._commit([each for each in together if each is not None])
        with suppress(sqlite3.Error):
            self._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._writing.close()

    def _commit(self, tasks: list[_Task]) -> None:
        failed: StoreError | None = None
        results: list[int | None] = []
        try:
            self._writing.execute("BEGIN IMMEDIATE")
            for user, rows, _ in tasks:
                if rows is None:
                    results.append(self._forget(user))
                else:
                    self._record(user, rows)
                    results.append(None)
            self._writing.execute("COMMIT")
            if any(rows is None for _, rows, _ in tasks):
                self._writing.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what was forgotten is in the log still
        except sqlite3.Error as error:
            failed = _translate_error(error)
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._writing.execute("ROLLBACK")
        for place, each in enumerate(tasks):
            if not each.done.set_running_or_notify_cancel():
                continue
            if failed is None:
                each.done.set_result(results[place])
            else:
                each.done.set_exception(failed)

    def _record(self, user: str, rows: list[tuple[int, str, str]]) -> None:
        (change,) = self._writing.execute(_CHANGE, [user, new_version()]).fetchone()
        self._writing.executemany(_RECORD, [(user, ts_ms, item, change, text) for ts_ms, item, text in rows])

    def _forget(self, user: str) -> int:
        self._writing.execute("DELETE FROM users WHERE user = ?", [user])
        return self._writing.execute("DELETE FROM impressions WHERE user = ?", [user]).rowcount


def _connect(file: str) -> sqlite3.Connection:
    return sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _open(file: str) -> sqlite3.Connection:
    """A connection that writes, to a store that is there afterwards."""
    try:
        connection = _connect(file)
        try:
            _make(connection, file)
            _use_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
        except BaseException:
            connection.close()  # with what it has locked
            raise
    except sqlite3.Error as error:
        raise UserError(f"{file}: cannot be used as a store ({error})") from error
    return connection


def _make(connection: sqlite3.Connection, file: str) -> None:
    """Make the tables of an empty file, asked and done under one lock: another process may do the same now."""
    connection.execute("BEGIN IMMEDIATE")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == tables == 0:
        for statement in _TABLES:
            connection.execute(statement)
    elif application != APPLICATION:
        raise UserError(f"{file}: is a database, but not one of impressions")
    elif version > SCHEMA_VERSION:
        raise UserError(f"{file}: is of version {version}, this a2gen reads {SCHEMA_VERSION}: made by a newer one")
    connection.execute("COMMIT")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log, should it have none: SQLite itself does not wait for others with this."""
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
    """Without SQLite's own words, which may name values."""
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if name == "SQLITE_FULL":
        return StoreFull("the store of impressions is full")
    return StoreUnavailable(f"the store of impressions does not work ({name})")
