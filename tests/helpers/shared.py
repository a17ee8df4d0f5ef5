"""Directory that all processes of a test session share."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

directory: Path | None = None
"""Directory of the session; set by ``conftest.py``."""


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Yield the path ``name`` in the directory, which one process at a time gets."""
    assert directory is not None
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory / name
