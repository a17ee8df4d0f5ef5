"""Identity of the files of a SQLite store: are the files at the path those that SQLite has open?

SQLite 3.40 compares them only when it opens a file. Commits to a file that was moved, removed or overwritten succeed
and are lost, for example after ``rm``, a log rotation, or a backup restored under a running service.
"""

import errno
import os
import sqlite3
import threading
import time
from contextlib import closing
from urllib.parse import quote

from a2gen_rec.serving.stores.base import StoreUnavailable

_CONTENT_ERRORS = {"SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_ERROR"}
"""Errors of a file that is no store; SQLITE_ERROR is a missing table. Others, like a lack of descriptors, may pass."""
_RETRY_DELAYS_S = (0.0, 0.01, 0.02, 0.04, 0.08)
"""Delays before reads of the database file. A read may fail while SQLite copies the log into the file."""


class StoreOverwritten(StoreUnavailable):
    """Another program wrote to the database file. The write-ahead log does not belong to its content."""


class StoreFiles:
    """Database, write-ahead log and its index as they are when the object is created. Thread-safe.

    Device and inode identify the files. Programs that write into an existing file, like ``cp``, keep both. Size and
    modification time reveal those; they also change when SQLite copies the log into the file. The row of the table
    ``store`` distinguishes the two: the file's identifier stays, and its number of commits never decreases.

    Args:
        file: Path of the database, which is open and has a write-ahead log.
        store_id: Identifier in the table ``store``.

    Raises:
        OSError: A file is missing.
    """

    def __init__(self, file: str, store_id: str) -> None:
        file = os.path.abspath(file)
        actual = os.path.realpath(file)  # SQLite puts the log next to the target of a symbolic link
        self.log = f"{actual}-wal"
        self._paths = (file, self.log, f"{actual}-shm")
        self._inodes = [_inode(os.stat(path)) for path in self._paths]
        self._uri = f"file:{quote(file)}?mode=ro&immutable=1"
        self._store_id, self._commits = store_id, -1
        self._valid: tuple[int, int] | None = None  # size and modification time of the checked content
        self._invalid: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise an error if a commit now could be lost.

        Raises:
            StoreOverwritten: The database file has another content.
            StoreUnavailable: A file was moved, removed or replaced, or cannot be read.
        """
        try:
            stats = [os.stat(path) for path in self._paths]
            if [_inode(stat) for stat in stats] != self._inodes:
                raise StoreUnavailable("a file of the event store was replaced; restart the service")
            if _written(stats[0]) != self._valid:
                with self._lock:  # so that no older number of commits is compared with a newer one
                    self._check_content()
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0, "OSError")
            raise StoreUnavailable(f"a file of the event store was moved or removed ({reason})") from error

    def _check_content(self) -> None:
        for delay_s in _RETRY_DELAYS_S if _written(os.stat(self._paths[0])) != self._invalid else ():
            time.sleep(delay_s)
            written = _written(os.stat(self._paths[0]))
            store_id, commits = self._read_row()
            if store_id == self._store_id and commits >= self._commits:
                self._valid, self._invalid, self._commits = written, None, commits
                return
            self._valid, self._invalid = None, written
        raise StoreOverwritten("the file of the event store was overwritten; restart the service")

    def _read_row(self) -> tuple[str, int]:
        try:
            # Without the log: the content of the database file alone.
            with closing(sqlite3.connect(self._uri, uri=True)) as connection:
                return connection.execute("SELECT id, commits FROM store").fetchone() or ("", 0)
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            if name in _CONTENT_ERRORS:
                return "", 0
            raise StoreUnavailable(f"event store error ({name})") from error


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _written(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
