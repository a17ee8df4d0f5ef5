"""Exclusive locks between processes, held through an open file: the operating system releases them at any exit."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class FileLock:
    """Lock of the file at ``path``, held through ``stream``."""

    path: str
    stream: TextIO

    def is_held(self) -> bool:
        """Return whether the file at ``path`` is still the locked one, neither removed nor replaced."""
        try:
            return os.path.samestat(os.fstat(self.stream.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False


@contextmanager
def exclusive_file_lock(path: str) -> Iterator[FileLock]:
    """Hold the lock of a local file, which is created for it and removed afterwards.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file cannot be written, or its file system has no locks.
    """
    lock = _acquire(path)
    try:
        yield lock
    finally:
        with suppress(OSError):
            if lock.is_held():
                os.remove(path)
        lock.stream.close()


def lock_owner(path: str) -> str:
    """Return a description of the process that holds the lock of a file; empty if unknown."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _acquire(path: str) -> FileLock:
    while True:
        lock = FileLock(path, open(path, "a", encoding="utf-8"))  # noqa: SIM115  -- open while the lock is held
        try:
            fcntl.flock(lock.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.is_held():  # otherwise its owner removed the file after it was opened here
                lock.stream.truncate(0)
                lock.stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
                lock.stream.flush()
                return lock
        except BaseException:
            lock.stream.close()
            raise
        lock.stream.close()
