"""Lists of table rows with weights: the values of a multi-valued feature, one bag per user or impression."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bags:
    """Bags as flat arrays. A bag is never empty: that of an entity without known values has row 0.

    Attributes:
        lengths: [bags] int64 number of values.
        ids: [values] int64 table rows.
        weights: [values] float32 positive weights.
    """

    lengths: np.ndarray
    ids: np.ndarray
    weights: np.ndarray

    @classmethod
    def unknown(cls, count: int) -> "Bags":
        """Return bags without known values."""
        return cls(np.ones(count, np.int64), np.zeros(count, np.int64), np.ones(count, np.float32))

    @classmethod
    def concat(cls, parts: Sequence["Bags"]) -> "Bags":
        """Concatenate the bags of at least one part."""
        return cls(
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.weights for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: np.ndarray) -> "Bags":
        """Return copies of the bags ``index`` (int64)."""
        starts = np.cumsum(self.lengths) - self.lengths
        lengths = self.lengths[index]
        ends = np.cumsum(lengths)
        values = np.arange(lengths.sum()) + np.repeat(starts[index] - ends + lengths, lengths)
        return Bags(lengths, self.ids[values], self.weights[values])

    def without(self, dropped: np.ndarray) -> "Bags":
        """Return the bags without the values that ``dropped`` [values] marks; a bag without any value is unknown."""
        if not dropped.any():
            return self
        bag = np.repeat(np.arange(len(self)), self.lengths)
        lengths = np.bincount(bag[~dropped], minlength=len(self))
        kept = ~dropped
        kept[(np.cumsum(self.lengths) - self.lengths)[lengths == 0]] = True
        ids, weights = np.where(dropped, 0, self.ids), np.where(dropped, np.float32(1), self.weights)
        return Bags(np.maximum(lengths, 1), ids[kept], weights[kept])
