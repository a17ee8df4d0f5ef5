"""Memory-bounded cache of encoded histories: only new impressions of a user are encoded."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from a2gen_rec.data.features.sessions import POSITION_EDGES
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.serving.stores.base import EventStore, is_successor

if TYPE_CHECKING:
    from a2gen_rec.ranking.history import EncodedHistory
    from a2gen_rec.ranking.ranker import Ranker

SESSION_MARGIN = int(POSITION_EDGES[-1])
"""Impressions read in addition to those that the model can use. Session positions depend on earlier impressions; beyond
this many, all positions are equal to the model."""


@dataclass(frozen=True)
class _Entry:
    history: "EncodedHistory"
    version: int
    bytes: int


class HistoryCache:
    """LRU cache of the histories of one model's users. Thread-safe.

    Every lookup asks the store for changes, so acknowledged impressions count in the next request, whichever process
    wrote them.

    Args:
        ranker: The model.
        store: Event store.
        max_bytes: Memory bound of the cached histories.
    """

    def __init__(self, ranker: "Ranker", store: EventStore, max_bytes: int) -> None:
        self.ranker, self.store, self.max_bytes = ranker, store, max_bytes
        self.max_impressions = ranker.card.max_history + SESSION_MARGIN
        self.hits = self.misses = self.extended = self.bytes = 0
        self.empty_history = ranker.encode([])
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, user: str, now_ms: int | None = None) -> "EncodedHistory":
        """Return the stored history of a user; empty for unknown users.

        Args:
            user: The user.
            now_ms: Query time up to which the history must be complete. It may contain later impressions.

        Raises:
            StoreUnavailable: The store cannot be read.
        """
        with self._lock:
            history = self._latest(user)
        is_full = len(history) >= self.ranker.max_history
        if now_ms is None or not is_full or now_ms >= history.ts_ms[-1]:
            return history
        # An earlier query time needs older impressions, which are no longer cached.
        _, impressions = self.store.get_recent(user, self.max_impressions, until_ms=now_ms)
        return self._encode(impressions, self.empty_history)

    def evict(self, user: str) -> None:
        """Remove a user's history; call it after the deletion from the store."""
        with self._lock:
            self._remove(user)

    def _latest(self, user: str) -> "EncodedHistory":
        entry = self._entries.get(user)
        version, new = self.store.get_recent(user, self.max_impressions, entry.version if entry else 0)
        if entry and version == entry.version:
            self.hits += 1
            self._entries.move_to_end(user)
            return entry.history
        if entry and not is_successor(version, entry.version):
            self._remove(user)
            entry = None
        if not version:
            return self.empty_history
        self.extended += entry is not None
        self.misses += entry is None
        history = self._encode(new, entry.history if entry else self.empty_history)
        self._put(user, _Entry(history, version, size_bytes(history) + 2 * len(user.encode())))
        return history

    def _encode(self, impressions: Sequence[Impression], after: "EncodedHistory") -> "EncodedHistory":
        try:
            return self.ranker.encode(impressions, after)
        except UserError:
            # Written while another model was served, whose log has more actions or features.
            return self.ranker.encode([impression for impression in impressions if self._is_valid(impression)], after)

    def _is_valid(self, impression: Impression) -> bool:
        try:
            self.ranker.validate(RankQuery("", ["any"], history=[impression]))
        except UserError:
            return False
        return True

    def _put(self, user: str, entry: _Entry) -> None:
        self._remove(user)
        self._entries[user] = entry
        self.bytes += entry.bytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1].bytes

    def _remove(self, user: str) -> None:
        if entry := self._entries.pop(user, None):
            self.bytes -= entry.bytes


def size_bytes(value: Any) -> int:
    """Return the memory of a history's arrays and strings in bytes."""
    if isinstance(value, np.ndarray):
        return value.nbytes + 112
    if isinstance(value, str | bytes):
        return len(value) + 56
    if isinstance(value, dict):
        return 64 + sum(size_bytes(item) for item in value.values())
    if isinstance(value, list):
        return 56 + sum(8 + size_bytes(item) for item in value)
    return 64 + sum(size_bytes(getattr(value, field.name)) for field in fields(value))
