"""Ranking by an exported model, in one process, without anything of training."""

from collections.abc import Sequence
from dataclasses import dataclass

from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.serving.history import History
from a2gen_rec.serving.types import Impression, RankedList, Request

CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class CacheCounts:
    """Action-level states of past impressions: looked up and found, or not; kept now, and their memory in bytes."""

    hits: int
    misses: int
    states: int
    bytes: int


class Ranker:
    """An exported model, ready to rank. One request at a time: threads that share one must take turns.

    Attributes:
        card: of the dataset: its actions, features and objectives.
        version: of the model, twelve hexadecimal digits that no other model has.
        manifest: as in the folder's ``manifest.json``.
    """

    card: DatasetCard
    version: str
    manifest: dict[str, object]

    @classmethod
    def load(cls, folder: str, cache_bytes: int = CACHE_BYTES) -> "Ranker":
        """Read and check a folder that ``a2gen export`` wrote.

        Args:
            folder: local or remote.
            cache_bytes: bound on the memory of cached action-level states.

        Raises:
            UserError: a file is missing, truncated or damaged, or the format is newer: naming file and reason.
        """
        raise NotImplementedError

    def rank(self, request: Request) -> RankedList:
        """The best candidates of one request.

        Raises:
            UserError: no candidate, an action or feature that the dataset does not have, or nothing to rank by of
                that name.
        """
        return self.rank_many([request])[0]

    def rank_many(self, requests: Sequence[Request]) -> list[RankedList]:
        """The same for many users in one batch; no request changes another's answer but for rounding.

        Raises:
            UserError: as :meth:`rank`, of the first request that has such an error; check with :meth:`check`.
        """
        raise NotImplementedError

    def check(self, request: Request) -> None:
        """Raise what :meth:`rank` would raise, at little cost: for a server that batches requests of many users."""
        raise NotImplementedError

    def encode(self, impressions: Sequence[Impression], after: History | None = None) -> History:
        """A user's past as the model reads it, to be kept by the caller: a few milliseconds, once per impression.

        Impressions may come late: they are put in order of time. One of an item and moment that ``after`` has too
        takes its place, as when more is known of it than when it began.

        Args:
            impressions: raw, of one user, in any order.
            after: what was kept of the same user before; it stays as it is.

        Raises:
            UserError: an action or feature that the dataset does not have, an action twice, a negative time.
        """
        raise NotImplementedError

    def knows_user(self, user: str) -> bool:
        """Whether the dataset has any impression of this user."""
        raise NotImplementedError

    def knows_item(self, item: str) -> bool:
        """Whether the dataset has this item."""
        raise NotImplementedError

    @property
    def cache(self) -> CacheCounts:
        """What became of cached states since the model was loaded."""
        raise NotImplementedError
