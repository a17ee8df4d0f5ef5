"""Memory-bounded LRU cache of action-level states of past impressions, shared between requests."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from a2gen_rec.ranking.types import CacheStats

_ENTRY_BYTES = 200
"""Bytes of a key and its dictionary entry, in addition to the state."""


class ActionStateCache:
    """LRU cache of states by key.

    A state depends only on the item and the actions, and so does its key (``EncodedHistory.state_keys``). A cached
    state is never stale: an impression that is encoded again with more information has another key.

    Args:
        max_bytes: Memory bound; a bound below the size of one state disables the cache.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._row_of: OrderedDict[bytes, int] = OrderedDict()
        self._states = torch.zeros(0, 0)
        self._capacity = -1

    @property
    def stats(self) -> CacheStats:
        return CacheStats(self.hits, self.misses, len(self._row_of), len(self._row_of) * self._entry_bytes)

    def lookup(self, keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Return the rows of cached states, -1 for missing ones, and the indices of the missing ``keys``.

        Cached states become the most recently used.
        """
        rows, missing, row_of = [], [], self._row_of
        for index, key in enumerate(keys):
            row = row_of.get(key, -1)
            if row < 0:
                missing.append(index)
            else:
                row_of.move_to_end(key)
            rows.append(row)
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        return rows, missing

    def gather(self, rows: list[int]) -> Tensor:
        """Return states [rows, d]; the values at row -1 are arbitrary."""
        return self._states[torch.tensor(rows)]

    def put(self, keys: Sequence[bytes], states: Tensor) -> None:
        """Add states [keys, d] and evict the least recently used ones beyond the bound."""
        if self._capacity < 0:
            self._states = states.new_zeros(0, states.shape[1])
            self._capacity = self.max_bytes // self._entry_bytes
        first = max(len(keys) - self._capacity, 0)
        rows, kept = [], []
        for index, key in enumerate(keys[-self._capacity :] if self._capacity else [], first):
            if key in self._row_of:
                continue
            self._row_of[key] = row = self._next_row()
            rows.append(row)
            kept.append(index)
        if rows:
            self._states[torch.tensor(rows)] = states[torch.tensor(kept)]

    @property
    def _entry_bytes(self) -> int:
        return _ENTRY_BYTES + self._states.shape[1] * self._states.element_size()

    def _next_row(self) -> int:
        if len(self._row_of) >= self._capacity:
            return self._row_of.popitem(last=False)[1]
        if len(self._row_of) >= len(self._states):  # double the storage, so that memory follows the number of states
            size = min(max(1024, 2 * len(self._states)), self._capacity)
            extra = self._states.new_zeros(size - len(self._states), self._states.shape[1])
            self._states = torch.cat([self._states, extra])
        return len(self._row_of)
