"""Action-level states of past impressions, kept between requests within a bound of memory."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRY_BYTES = 200
"""Of a name and its place in the dictionary, beside the state."""


@dataclass(frozen=True)
class CacheStats:
    """Action-level states of past impressions: looked up and found, or not; kept now, and their memory in bytes."""

    hits: int
    misses: int
    states: int
    bytes: int


class ActionStateCache:
    """The most recently used states, by name.

    A state depends on what was shown and done alone, and so does its name (``History.states``): one that is there is
    never out of date, and an impression that is encoded again, knowing more, has another name.

    Args:
        most_bytes: bound on memory; less than a state takes keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.most_bytes = max_bytes
        self.hits = self.misses = 0
        self._place: OrderedDict[bytes, int] = OrderedDict()
        self._rows = torch.zeros(0, 0)
        self._most = -1

    @property
    def counts(self) -> CacheStats:
        return CacheStats(self.hits, self.misses, len(self._place), len(self._place) * self._bytes_each)

    def lookup(self, names: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Places of those that are there, which now are the most recently used, and -1 of the others; and which
        of ``names`` these are."""
        places, missing, place_of = [], [], self._place
        for number, name in enumerate(names):
            place = place_of.get(name, -1)
            if place < 0:
                missing.append(number)
            else:
                place_of.move_to_end(name)
            places.append(place)
        self.hits += len(names) - len(missing)
        self.misses += len(missing)
        return places, missing

    def gather(self, places: list[int]) -> Tensor:
        """[places, d] states; whatever is there where a place is -1."""
        return self._rows[torch.tensor(places)]

    def put(self, names: Sequence[bytes], states: Tensor) -> None:
        """Keep states [names, d], dropping the least recently used ones beyond the bound."""
        if self._most < 0:
            self._rows = states.new_zeros(0, states.shape[1])
            self._most = self.most_bytes // self._bytes_each
        places, kept = [], []
        for number, name in enumerate(names[-self._most :] if self._most else [], max(len(names) - self._most, 0)):
            if name in self._place:
                continue
            self._place[name] = place = self._next_place()
            places.append(place)
            kept.append(number)
        if places:
            self._rows[torch.tensor(places)] = states[torch.tensor(kept)]

    @property
    def _bytes_each(self) -> int:
        return _ENTRY_BYTES + self._rows.shape[1] * self._rows.element_size()

    def _next_place(self) -> int:
        if len(self._place) >= self._most:
            return self._place.popitem(last=False)[1]
        if len(self._place) >= len(self._rows):  # grown by doubling: memory follows what is kept
            grown = min(max(1024, 2 * len(self._rows)), self._most)
            more = self._rows.new_zeros(grown - len(self._rows), self._rows.shape[1])
            self._rows = torch.cat([self._rows, more])
        return len(self._place)
