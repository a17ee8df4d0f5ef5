"""Protocol, errors and serialization of event stores, which keep raw impressions between restarts of the service."""

import json
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from a2gen_rec.ranking.types import Impression

MAX_TIMESTAMP_MS = 2**53
"""Later than any timestamp, and an exact integer in every database."""
VERSION_BITS = 32
"""Low bits of a user's version, which count changes. The high bits identify the history since the last deletion."""


class StoreError(Exception):
    """Impressions could not be written or read; the message contains none of them."""


class StoreFull(StoreError):
    """No space left for impressions."""


class StoreBusy(StoreError):
    """Too many pending writes."""


class StoreUnavailable(StoreError):
    """The database does not respond, or failed."""


class EventStore(Protocol):
    """Impressions by user. Thread-safe."""

    def put(self, user: str, impressions: Sequence[Impression]) -> "Future[None]":
        """Write impressions atomically. One with the same item and time is replaced, so retries are safe.

        Returns:
            A future that is done once the impressions survive a crash of process and machine, or that fails with a
            StoreError.

        Raises:
            StoreBusy: Too many pending writes; retry later.
        """
        ...

    def delete_user(self, user: str) -> "Future[int]":
        """Delete all impressions of a user and the user itself.

        Returns:
            A future of the number of impressions, done once the deletion is durable, or that fails with a StoreError.
            :attr:`is_overwritten` reports when nothing of them is left in the database's files.

        Raises:
            StoreBusy: Too many pending writes; retry later.
        """
        ...

    def get_recent(
        self, user: str, limit: int, since_version: int = 0, until_ms: int = MAX_TIMESTAMP_MS
    ) -> tuple[int, list[Impression]]:
        """Return the most recent impressions of a user.

        Args:
            user: The user.
            limit: Maximum number of impressions.
            since_version: Version of a previous read; impressions unchanged since then may be omitted.
            until_ms: Latest start time.

        Returns:
            The version of the user's history, 0 without impressions; and the impressions, oldest first. If the version
            is a successor (:func:`is_successor`) of ``since_version``, impressions of the previous read are still
            stored; otherwise the result is complete.

        Raises:
            StoreUnavailable: The read failed.
        """
        ...

    def sample_users(self, count: int) -> list[str]:
        """Return at most ``count`` users with impressions, whichever are cheap to find.

        Raises:
            StoreUnavailable: The read failed.
        """
        ...

    @property
    def is_overwritten(self) -> bool | None:
        """Whether all deleted content is overwritten in the database's files; None if the store cannot know."""
        ...

    def check(self) -> None:
        """Raise an error if writes would be lost: the database's files were moved, removed, replaced or overwritten.

        Raises:
            StoreUnavailable: They were.
        """
        ...

    def close(self) -> None:
        """Complete pending writes and close the database."""
        ...


def new_version() -> int:
    """Return the version before a user's first change; it is not a successor of any previous version."""
    return (1 + secrets.randbits(30)) << VERSION_BITS


def is_successor(version: int, previous: int) -> bool:
    """Return whether no deletion of the user happened between two versions."""
    return version >= previous and version >> VERSION_BITS == previous >> VERSION_BITS


def serialize(impression: Impression) -> str:
    """Return the JSON content of an impression, without its item and time."""
    content: dict[str, Any] = {
        "watch_s": impression.watch_s,
        "actions": [[name, seconds] for name, seconds in impression.actions],
        "features": dict(impression.features),
    }
    if impression.labels:
        content["labels"] = dict(impression.labels)
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def deserialize(item: str, ts_ms: int, text: str) -> Impression:
    """Return the impression of an item, a time and the JSON content."""
    content = json.loads(text)
    actions = [(name, seconds) for name, seconds in content["actions"]]
    return Impression(item, ts_ms, content["watch_s"], actions, content["features"], content.get("labels", {}))
