"""One model that ranks batches of requests, by the histories that they bring or those that are recorded."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from a2gen_rec.ranking.history import EncodedHistory
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankedList, RankQuery
from a2gen_rec.ranking.window import now_ms
from a2gen_rec.serving.engine.history_cache import HistoryCache
from a2gen_rec.serving.stores.base import EventStore, StoreError
from a2gen_rec.utils.malloc import freeze_gc

WARMUP_ITEMS = 64
"""Items that a model ranks before it is put in service."""
RANKING_NICENESS = 10
"""Of what ranks: where cores are short, the event loop, which needs little, goes first."""


@dataclass(frozen=True)
class RankJob:
    """A request; ``is_recorded`` tells whether its history is to be that of the store."""

    request: RankQuery
    use_stored_history: bool


@dataclass(frozen=True)
class RankResult:
    """An answer, and what it had to make do with."""

    ranked: RankedList
    fallbacks: list[str]


class InProcessBackend:
    """A model in this process, ready: what is slow the first time has been done. One batch at a time.

    Args:
        store: of recorded histories.
        history_cache: bytes of them that are kept encoded.
    """

    def __init__(self, ranker: Ranker, store: EventStore, history_cache: int) -> None:
        self.ranker = ranker
        history = ranker.encode([Impression("", 0)])
        ranker.rank(RankQuery("", ranker.sample_items(WARMUP_ITEMS) or [""], history=history))
        self.histories = HistoryCache(ranker, store, history_cache)
        freeze_gc()

    def rank(self, jobs: Sequence[RankJob]) -> list[RankResult | Exception]:
        """An answer or an error for each job."""
        made = [self._prepared(job) for job in jobs]
        ranked = iter(_ranked([each[0] for each in made if not isinstance(each, Exception)], self.ranker))
        results: list[RankResult | Exception] = []
        for each in made:
            if isinstance(each, Exception):
                results.append(each)
                continue
            answer = next(ranked)
            if isinstance(answer, RankedList):
                results.append(RankResult(answer, [*answer.fallbacks, *each[1]]))
            else:
                results.append(answer)
        return results

    def forget(self, user: str) -> None:
        """Drop what is kept of a user; to be called once it is no longer in the store."""
        self.histories.evict(user)

    def counts(self) -> dict[str, float]:
        """What became of what is kept, by name."""
        states, histories = self.ranker.cache_stats, self.histories
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
    def workers(self) -> int:
        """How many batches can be ranked at a time, now."""
        return 1

    def close(self) -> None:
        """Nothing is to be done."""

    def _prepared(self, job: RankJob) -> tuple[RankQuery, list[str]] | Exception:
        """The request with its history, and what is amiss; an error where the model cannot do it."""
        try:
            if not job.use_stored_history:
                self.ranker.validate(job.request)  # again: another model may be in service than when it came
                return job.request, []
            try:
                past, amiss = self.histories.get(job.request.user, job.request.now_ms), []
            except StoreError:
                past, amiss = self.histories.nothing, ["history_unavailable"]
            request = replace(job.request, history=past, now_ms=_moment(job.request, past))
            self.ranker.validate(request)
            return request, amiss
        except Exception as error:
            return error


def lower_thread_priority() -> None:
    """Let the event loop go first: to be called by the thread that ranks."""
    if sys.platform == "linux":  # of this thread; elsewhere it would be of the whole process
        os.nice(RANKING_NICENESS)


def _moment(request: RankQuery, past: EncodedHistory) -> int:
    """When the user is there: now, if the request does not say. What is recorded has begun, whatever its clock said."""
    if request.now_ms is not None:
        return request.now_ms
    return max(now_ms(), int(past.ts_ms[-1])) if len(past) else now_ms()


def _ranked(requests: list[RankQuery], ranker: Ranker) -> Sequence[RankedList | Exception]:
    """Answers in order. Should a batch fail, each is tried alone: no request spoils another's."""
    if not requests:
        return []
    try:
        return ranker.rank_batch(requests)
    except Exception as error:
        if len(requests) == 1:
            return [error]
        return [answer for request in requests for answer in _ranked([request], ranker)]
