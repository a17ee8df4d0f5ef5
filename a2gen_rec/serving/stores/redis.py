"""Event store in Redis, to be shared by several services. Durability depends on ``appendfsync`` of the server."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import redis

from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.stores.base import (
    MAX_TIMESTAMP_MS,
    StoreBusy,
    StoreFull,
    StoreUnavailable,
    deserialize,
    new_version,
    serialize,
)

PREFIX = "a2gen:1"
VERSION_FIELD = "changes"
THREADS = 8
SCAN_COUNT = 1000
MAX_WAITING = 4096
TIMEOUT_S = 0.5
CIRCUIT_BREAK_S = 1.0
"""Seconds without calls to a server that has failed; rankings continue without its histories."""

Result = TypeVar("Result")


class RedisStore:
    """:class:`~a2gen_rec.serving.stores.base.EventStore` in Redis.

    Each user has a sorted set of ``TS_MS:ITEM`` by time, and a hash of their contents. The hash also contains the
    version, under a key without a colon.

    Args:
        address: redis:// or rediss:// address.
        client: Client to use instead of the address, for tests.

    Raises:
        UserError: The server does not respond.
    """

    def __init__(self, address: str, client: Any = None) -> None:
        timeouts = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        self._client = client or redis.Redis.from_url(address, decode_responses=True, **timeouts)
        self._threads = ThreadPoolExecutor(THREADS, "store")
        self._slots = threading.BoundedSemaphore(MAX_WAITING)
        self._retry_at = 0.0
        try:
            self._client.ping()
        except redis.RedisError as error:
            raise UserError(f"the event store's Redis does not respond ({type(error).__name__})") from error

    def put(self, user: str, impressions: Sequence[Impression]) -> "Future[None]":
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        return self._submit(lambda: self._write(user, impressions))

    def delete_user(self, user: str) -> "Future[int]":
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        return self._submit(lambda: self._delete(user))

    def get_recent(
        self, user: str, limit: int, since_version: int = 0, until_ms: int = MAX_TIMESTAMP_MS
    ) -> tuple[int, list[Impression]]:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`; any change reads all impressions again."""
        return self._call(lambda: self._read(user, limit, since_version, until_ms))

    def sample_users(self, count: int) -> list[str]:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`; scans some of the keys."""
        before, after = _keys("\n")[0].split("\n")
        keys: Any
        _, keys = self._call(lambda: self._client.scan(0, match=f"{before}*{after}", count=SCAN_COUNT))
        return sorted(key.removeprefix(before).removesuffix(after) for key in keys)[:count]

    @property
    def is_overwritten(self) -> None:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`; unknown, because Redis rewrites its files later."""
        return None

    def check(self) -> None:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`; does nothing, because Redis owns its files."""

    def close(self) -> None:
        """See :class:`~a2gen_rec.serving.stores.base.EventStore`."""
        self._threads.shutdown()
        self._client.close()

    def _submit(self, write: Callable[[], Result]) -> "Future[Result]":
        if not self._slots.acquire(blocking=False):
            raise StoreBusy("too many pending writes")
        try:
            done = self._threads.submit(self._call, write)
        except RuntimeError:  # closed
            self._slots.release()
            raise StoreBusy("the event store is closed") from None
        done.add_done_callback(lambda _: self._slots.release())
        return done

    def _write(self, user: str, impressions: Sequence[Impression]) -> None:
        order, contents = _keys(user)
        members = {f"{impression.ts_ms}:{impression.item}": impression for impression in impressions}
        transaction = self._client.pipeline(transaction=True)
        transaction.hset(contents, mapping={member: serialize(impression) for member, impression in members.items()})
        transaction.zadd(order, {member: impression.ts_ms for member, impression in members.items()})
        transaction.hsetnx(contents, VERSION_FIELD, str(new_version()))
        transaction.hincrby(contents, VERSION_FIELD, 1)
        transaction.execute()

    def _delete(self, user: str) -> int:
        order, contents = _keys(user)
        transaction = self._client.pipeline(transaction=True)
        transaction.zcard(order)
        transaction.delete(order, contents)
        return int(transaction.execute()[0])

    def _read(self, user: str, limit: int, since_version: int, until_ms: int) -> tuple[int, list[Impression]]:
        order, contents = _keys(user)
        # The version is read first: a change between the two reads is read again next time, not missed.
        version = int(self._client.hget(contents, VERSION_FIELD) or 0)
        members: Any = (
            self._client.zrevrangebyscore(order, until_ms, "-inf", 0, limit) if version != since_version else []
        )
        texts = self._client.hmget(contents, members) if members else []
        impressions = []
        for member, text in zip(reversed(members), reversed(texts), strict=True):
            ts_ms, _, item = member.partition(":")
            if text is not None:  # otherwise deleted in the meantime
                impressions.append(deserialize(item, int(ts_ms), text))
        return version, impressions

    def _call(self, operation: Callable[[], Result]) -> Result:
        if time.monotonic() < self._retry_at:
            raise StoreUnavailable("event store timed out")
        try:
            return operation()
        except redis.OutOfMemoryError as error:
            raise StoreFull("event store is full") from error
        except redis.RedisError as error:
            self._retry_at = time.monotonic() + CIRCUIT_BREAK_S
            raise StoreUnavailable(f"event store error ({type(error).__name__})") from error


def _keys(user: str) -> tuple[str, str]:
    """Return the keys of the sorted set and of the hash; braces keep both on one node of a cluster."""
    return f"{PREFIX}:order:{{{user}}}", f"{PREFIX}:contents:{{{user}}}"
