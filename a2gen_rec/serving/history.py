"""A user's past as the model reads it: what a server keeps of a user between requests."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class History:
    """Encoded impressions of one user, oldest first: made by ``Ranker.encode``, immutable, of use to that model only.

    Only the last impressions that the model may see are kept, so that a caller may append for ever.

    Attributes:
        ts_ms, end_ms: [impressions] int64 begin and end.
    """

    ts_ms: np.ndarray
    end_ms: np.ndarray

    def __len__(self) -> int:
        return len(self.ts_ms)
