"""Encoded pasts of users who come often, kept in memory: what is new of one is encoded, and no more."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from a2gen_rec.data.features.sessions import POSITION_EDGES
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.history import EncodedHistory
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.serving.stores.base import EventStore, is_successor

SESSION_MARGIN = int(POSITION_EDGES[-1])
"""Impressions read beyond those the model may see: places in sessions follow from earlier ones, and beyond this many
all places are one to the model."""


@dataclass(frozen=True)
class _Entry:
    history: EncodedHistory
    changes: int
    bytes: int


class HistoryCache:
    """Histories of one model's users, the least recently asked for dropped first. Any thread may call.

    The store is asked every time whether anything has changed, so what is acknowledged counts in the next request,
    whichever process recorded it.

    Args:
        max_bytes: bound on the memory of what is kept.
    """

    def __init__(self, ranker: Ranker, store: EventStore, max_bytes: int) -> None:
        self.ranker, self.store, self.max_bytes = ranker, store, max_bytes
        self.last = ranker.card.max_history + SESSION_MARGIN
        self.hits = self.misses = self.extended = self.bytes = 0
        self.nothing = ranker.encode([])
        self._kept: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, user: str, now_ms: int | None = None) -> EncodedHistory:
        """What is recorded of a user; empty for one unheard of.

        Args:
            now_ms: a moment, up to which all that matters is there. What began later may be there too.

        Raises:
            StoreUnavailable: the store cannot be read now.
        """
        with self._lock:
            history = self._latest(user)
        is_full = len(history) >= self.ranker.max_history
        if now_ms is None or not is_full or now_ms >= history.ts_ms[-1]:
            return history
        # As of an earlier moment there were others in place of the latest, which are kept no longer.
        _, past = self.store.get_recent(user, self.last, until_ms=now_ms)
        return self._encoded(past, self.nothing)

    def evict(self, user: str) -> None:
        """Drop what is kept of a user; to be called once it is no longer in the store."""
        with self._lock:
            self._drop(user)

    def _latest(self, user: str) -> EncodedHistory:
        kept = self._kept.get(user)
        changes, fresh = self.store.get_recent(user, self.last, kept.changes if kept else 0)
        if kept and changes == kept.changes:
            self.hits += 1
            self._kept.move_to_end(user)
            return kept.history
        if kept and not is_successor(changes, kept.changes):
            self._drop(user)
            kept = None
        if not changes:
            return self.nothing
        self.extended += kept is not None
        self.misses += kept is None
        history = self._encoded(fresh, kept.history if kept else self.nothing)
        self._keep(user, _Entry(history, changes, size_bytes(history) + 2 * len(user.encode())))
        return history

    def _encoded(self, fresh: Sequence[Impression], before: EncodedHistory) -> EncodedHistory:
        try:
            return self.ranker.encode(fresh, before)
        except UserError:
            # Recorded when another model was served, whose log knows more actions or features.
            return self.ranker.encode([each for each in fresh if self._is_readable(each)], before)

    def _is_readable(self, impression: Impression) -> bool:
        try:
            self.ranker.validate(RankQuery("", ["any"], history=[impression]))
        except UserError:
            return False
        return True

    def _keep(self, user: str, kept: _Entry) -> None:
        self._drop(user)
        self._kept[user] = kept
        self.bytes += kept.bytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].bytes

    def _drop(self, user: str) -> None:
        if kept := self._kept.pop(user, None):
            self.bytes -= kept.bytes


def size_bytes(value: Any) -> int:
    """Memory of a history, in bytes: that of its arrays and strings."""
    if isinstance(value, np.ndarray):
        return value.nbytes + 112
    if isinstance(value, str | bytes):
        return len(value) + 56
    if isinstance(value, dict):
        return 64 + sum(size_bytes(each) for each in value.values())
    if isinstance(value, list):
        return 56 + sum(8 + size_bytes(each) for each in value)
    return 64 + sum(size_bytes(getattr(value, field.name)) for field in fields(value))
