"""Where a service keeps what users did, between its own restarts: raw impressions, in whichever database."""

import json
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from a2gen_rec.ranking.types import Impression

MAX_TIMESTAMP_MS = 2**53
"""Later than any moment, and a whole number in every database."""
VERSION_BITS = 32
"""Bits of a number of changes that count them. Those above tell a user's past from the one before it was forgotten."""


class StoreError(Exception):
    """Impressions could not be recorded or read; the message has none of them."""


class StoreFull(StoreError):
    """There is no room for more."""


class StoreBusy(StoreError):
    """Too many wait to be recorded already."""


class StoreUnavailable(StoreError):
    """The database does not answer, or not as it should."""


class EventStore(Protocol):
    """Impressions of users. Any thread may call."""

    def put(self, user: str, impressions: Sequence[Impression]) -> "Future[None]":
        """Record impressions, all or none of them; one of the same item and moment is replaced, so retries are safe.

        Returns:
            done once they outlast the process and the machine's power, or failed with a StoreError.

        Raises:
            StoreBusy: come back later.
        """
        ...

    def delete_user(self, user: str) -> "Future[int]":
        """Delete all that is recorded of a user, and that there was one.

        Returns:
            number of impressions, once none of them comes back, or failed with a StoreError.

        Raises:
            StoreBusy: come back later.
        """
        ...

    def get_recent(
        self, user: str, last: int, since: int = 0, until_ms: int = MAX_TIMESTAMP_MS
    ) -> tuple[int, list[Impression]]:
        """A user's last impressions.

        Args:
            last: how many at the most.
            since: number of changes at a former reading: impressions unchanged since then may be left out.
            until_ms: the last moment at which one may have begun.

        Returns:
            number of changes to what is recorded of this user, 0 for none; the impressions, oldest first. Those of a
            former reading are still recorded if this number :func:`follows` the one of then; else all are here.

        Raises:
            StoreUnavailable: they cannot be read now.
        """
        ...

    def sample_users(self, count: int) -> list[str]:
        """Users of whom something is recorded, ``count`` at the most, whichever are found at once.

        Raises:
            StoreUnavailable: they cannot be read now.
        """
        ...

    def close(self) -> None:
        """Record what waits, and let go of the database."""
        ...


def new_version() -> int:
    """A number of changes to begin with, which follows none there was."""
    return (1 + secrets.randbits(30)) << VERSION_BITS


def is_successor(changes: int, former: int) -> bool:
    """Whether the user was not forgotten between two numbers of changes."""
    return changes >= former and changes >> VERSION_BITS == former >> VERSION_BITS


def serialize(impression: Impression) -> str:
    """What is recorded of an impression beside its item and moment: JSON."""
    content = {
        "watch_s": impression.watch_s,
        "actions": [[name, seconds] for name, seconds in impression.actions],
        "features": dict(impression.features),
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def deserialize(item: str, ts_ms: int, text: str) -> Impression:
    content = json.loads(text)
    actions = [(name, seconds) for name, seconds in content["actions"]]
    return Impression(item, ts_ms, content["watch_s"], actions, content["features"])
