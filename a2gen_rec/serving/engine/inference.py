"""Inference backend: one model that ranks batches of requests with given or stored histories."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from a2gen_rec.ranking.types import Impression, RankedList, RankQuery
from a2gen_rec.ranking.window import now_ms
from a2gen_rec.serving.engine.history_cache import HistoryCache
from a2gen_rec.serving.stores.base import EventStore, StoreError
from a2gen_rec.utils.malloc import freeze_gc

if TYPE_CHECKING:
    from a2gen_rec.ranking.history import EncodedHistory
    from a2gen_rec.ranking.ranker import Ranker

WARMUP_ITEMS = 64
"""Number of items ranked before a model goes into service."""
RANKING_NICENESS = 10
"""Niceness of ranking threads: if cores are scarce, the event loop, which needs little time, runs first."""


@dataclass(frozen=True)
class RankJob:
    """A request, and whether to use the stored history instead of the request's."""

    request: RankQuery
    use_stored_history: bool


@dataclass(frozen=True)
class RankResult:
    """A ranked list, and the fallbacks that it used."""

    ranked: RankedList
    fallbacks: list[str]


def load_ranker(model_dir: str, cache_bytes: int) -> "Ranker":
    """Load an exported model, see :meth:`Ranker.load`; imports torch."""
    from a2gen_rec.ranking.ranker import Ranker

    return Ranker.load(model_dir, cache_bytes)


class InProcessBackend:
    """A warmed-up model in this process. One batch at a time.

    Args:
        ranker: The model.
        store: Event store.
        history_cache_bytes: Memory bound of the cached histories.
    """

    def __init__(self, ranker: "Ranker", store: EventStore, history_cache_bytes: int) -> None:
        self.ranker = ranker
        history = ranker.encode([Impression("", now_ms())])
        ranker.rank(RankQuery("", ranker.sample_items(WARMUP_ITEMS) or [""], history=history))
        self.history_cache = HistoryCache(ranker, store, history_cache_bytes)
        freeze_gc()

    def rank(self, jobs: Sequence[RankJob]) -> list[RankResult | Exception]:
        """Return the result or error of each job."""
        prepared = [self._prepare(job) for job in jobs]
        requests = [job[0] for job in prepared if not isinstance(job, Exception)]
        ranked = iter(_rank_or_retry(requests, self.ranker))
        results: list[RankResult | Exception] = []
        for job in prepared:
            if isinstance(job, Exception):
                results.append(job)
                continue
            result = next(ranked)
            if isinstance(result, RankedList):
                results.append(RankResult(result, [*result.fallbacks, *job[1]]))
            else:
                results.append(result)
        return results

    def evict_history(self, user: str) -> None:
        """Remove a user's cached history; call it after the deletion from the store."""
        self.history_cache.evict(user)

    def cache_counts(self) -> dict[str, float]:
        """Return the counters of the caches by name."""
        states, histories = self.ranker.cache_stats, self.history_cache
        return {
            "state_cache_hits": states.hits,
            "state_cache_misses": states.misses,
            "state_cache_bytes": states.bytes,
            "history_cache_hits": histories.hits,
            "history_cache_extended": histories.extended,
            "history_cache_misses": histories.misses,
            "history_cache_bytes": histories.bytes,
        }

    @property
    def num_workers(self) -> int:
        """Number of batches that can be ranked at a time, now."""
        return 1

    def close(self) -> None:
        """Do nothing."""

    def _prepare(self, job: RankJob) -> tuple[RankQuery, list[str]] | Exception:
        """Return the request with its history, and its fallbacks; an error if the model does not support it."""
        try:
            if not job.use_stored_history:
                self.ranker.validate(job.request)  # again, because the model may have changed since the request came
                return job.request, []
            try:
                history, fallbacks = self.history_cache.get(job.request.user, job.request.now_ms), []
            except StoreError:
                history, fallbacks = self.history_cache.empty_history, ["history_unavailable"]
            request = replace(job.request, history=history, now_ms=_query_time(job.request, history))
            self.ranker.validate(request)
            return request, fallbacks
        except Exception as error:
            return error


def lower_thread_priority() -> None:
    """Lower the priority of the calling thread, so that the event loop runs first."""
    if sys.platform == "linux":  # affects this thread only; on other systems it would affect the process
        os.nice(RANKING_NICENESS)


def _query_time(request: RankQuery, history: "EncodedHistory") -> int:
    """Return the request's query time, by default now. Stored impressions count even if their clock was ahead."""
    if request.now_ms is not None:
        return request.now_ms
    return max(now_ms(), int(history.ts_ms[-1])) if len(history) else now_ms()


def _rank_or_retry(requests: list[RankQuery], ranker: "Ranker") -> Sequence[RankedList | Exception]:
    """Return the results in order. If a batch fails, its requests are retried one by one, so that only invalid ones
    fail."""
    if not requests:
        return []
    try:
        return ranker.rank_batch(requests)
    except Exception as error:
        if len(requests) == 1:
            return [error]
        return [result for request in requests for result in _rank_or_retry([request], ranker)]
