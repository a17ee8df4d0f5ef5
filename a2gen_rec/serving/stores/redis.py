"""Impressions in Redis, for several services that share them. They are as durable as its ``appendfsync`` says."""

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
"""For which nothing is asked of a server that has not answered: ranking goes on meanwhile, without its histories."""

Answer = TypeVar("Answer")


class RedisStore:
    """A :class:`~a2gen_rec.serving.stores.base.Store` in Redis.

    Of every user there is a sorted set of ``TS_MS:ITEM`` by time, and a hash of their contents, which counts changes
    too (under a name without a colon).

    Args:
        address: redis:// or rediss://.
        client: instead of one of the address, for tests.

    Raises:
        UserError: the server does not answer.
    """

    def __init__(self, address: str, client: Any = None) -> None:
        timeouts = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        self._client = client or redis.Redis.from_url(address, decode_responses=True, **timeouts)
        self._threads = ThreadPoolExecutor(THREADS, "store")
        self._free = threading.BoundedSemaphore(MAX_WAITING)
        self._asked_again = 0.0
        try:
            self._client.ping()
        except redis.RedisError as error:
            raise UserError(f"the store's Redis does not answer ({type(error).__name__})") from error

    def put(self, user: str, impressions: Sequence[Impression]) -> "Future[None]":
        """See :class:`~a2gen_rec.serving.stores.base.Store`."""
        return self._later(lambda: self._record(user, impressions))

    def delete_user(self, user: str) -> "Future[int]":
        """See :class:`~a2gen_rec.serving.stores.base.Store`."""
        return self._later(lambda: self._forget(user))

    def get_recent(
        self, user: str, last: int, since: int = 0, until_ms: int = MAX_TIMESTAMP_MS
    ) -> tuple[int, list[Impression]]:
        """See :class:`~a2gen_rec.serving.stores.base.Store`; whatever has changed, all are read again."""
        return self._ask(lambda: self._read(user, last, since, until_ms))

    def sample_users(self, count: int) -> list[str]:
        """See :class:`~a2gen_rec.serving.stores.base.Store`; a look at some of the keys."""
        before, after = _keys("\n")[0].split("\n")
        keys: Any
        _, keys = self._ask(lambda: self._client.scan(0, match=f"{before}*{after}", count=SCAN_COUNT))
        return sorted(key.removeprefix(before).removesuffix(after) for key in keys)[:count]

    def close(self) -> None:
        """See :class:`~a2gen_rec.serving.stores.base.Store`."""
        self._threads.shutdown()
        self._client.close()

    def _later(self, change: Callable[[], Answer]) -> "Future[Answer]":
        if not self._free.acquire(blocking=False):
            raise StoreBusy("too many impressions wait to be recorded")
        try:
            done = self._threads.submit(self._ask, change)
        except RuntimeError:  # closed
            self._free.release()
            raise StoreBusy("the store is closed") from None
        done.add_done_callback(lambda _: self._free.release())
        return done

    def _record(self, user: str, impressions: Sequence[Impression]) -> None:
        order, contents = _keys(user)
        members = {f"{each.ts_ms}:{each.item}": each for each in impressions}
        transaction = self._client.pipeline(transaction=True)
        transaction.hset(contents, mapping={member: serialize(each) for member, each in members.items()})
        transaction.zadd(order, {member: each.ts_ms for member, each in members.items()})
        transaction.hsetnx(contents, VERSION_FIELD, str(new_version()))
        transaction.hincrby(contents, VERSION_FIELD, 1)
        transaction.execute()

    def _forget(self, user: str) -> int:
        order, contents = _keys(user)
        transaction = self._client.pipeline(transaction=True)
        transaction.zcard(order)
        transaction.delete(order, contents)
        return int(transaction.execute()[0])

    def _read(self, user: str, last: int, since: int, until_ms: int) -> tuple[int, list[Impression]]:
        order, contents = _keys(user)
        # Changes before impressions: one that comes between the two is read again next time, not missed.
        changes = int(self._client.hget(contents, VERSION_FIELD) or 0)
        members: Any = self._client.zrevrangebyscore(order, until_ms, "-inf", 0, last) if changes != since else []
        texts = self._client.hmget(contents, members) if members else []
        found = []
        for member, text in zip(reversed(members), reversed(texts), strict=True):
            ts_ms, _, item = member.partition(":")
            if text is not None:  # deleted meanwhile
                found.append(deserialize(item, int(ts_ms), text))
        return changes, found

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        if time.monotonic() < self._asked_again:
            raise StoreUnavailable("the store of impressions does not answer")
        try:
            return question()
        except redis.OutOfMemoryError as error:
            raise StoreFull("the store of impressions is full") from error
        except redis.RedisError as error:
            self._asked_again = time.monotonic() + CIRCUIT_BREAK_S
            raise StoreUnavailable(f"the store of impressions does not work ({type(error).__name__})") from error


def _keys(user: str) -> tuple[str, str]:
    """Names of the order and of the contents; braces keep both on one node of a cluster."""
    return f"{PREFIX}:order:{{{user}}}", f"{PREFIX}:contents:{{{user}}}"
