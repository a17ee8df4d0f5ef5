"""The ranking service, whatever carries its requests: one model in service, batches of requests, recorded histories."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.serving.artifact import model_folder
from a2gen_rec.serving.batching import Batcher
from a2gen_rec.serving.histories import Histories
from a2gen_rec.serving.history import History
from a2gen_rec.serving.metrics import Metrics
from a2gen_rec.serving.rank import clock_ms
from a2gen_rec.serving.ranker import Ranker
from a2gen_rec.serving.store import Store, StoreError
from a2gen_rec.serving.types import Impression, RankedList, Request

WARM = 64
"""Items that a model ranks before it is put in service."""
MIB = 2**20

log = logging.getLogger(__name__)


class ModelRejected(Exception):
    """A model cannot be put in service; the former one stays."""


@dataclass(frozen=True)
class Ranked:
    """An answer, and what it had to make do with."""

    ranked: RankedList
    fallbacks: list[str]


@dataclass(frozen=True)
class _Job:
    request: Request
    is_recorded: bool
    """Whether the history is to be that of the store."""


@dataclass(frozen=True)
class _Model:
    """What is swapped as one: histories are encoded for one ranker."""

    ranker: Ranker
    histories: Histories


@dataclass
class Service:
    """Ranks and records; made and used in one event loop, but for the batches, which a thread of its own does.

    Args:
        model: folder of an exported model, a link to one, or a folder whose ``CURRENT`` names one.
        load: as ``Ranker.load``.

    Raises:
        UserError: the model cannot be used.
    """

    model: str
    store: Store
    config: ServeConfig = field(default_factory=ServeConfig)
    load: Callable[[str, int], Ranker] = Ranker.load
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    """Whether the service is about to end: it answers still, but wants no more requests."""

    def __post_init__(self) -> None:
        config = self.config
        self._model = self._loaded()
        self.metrics.serving(self.ranker.version)
        self.batcher: Batcher[_Job, Ranked] = Batcher(
            self._rank_batch,
            config.max_wait_ms / 1000,
            config.max_batch,
            config.max_waiting,
            config.max_queue_ms / 1000,
            self.metrics.batch,
        )
        self._reloading = asyncio.Lock()
        self._tell_of_caches()

    @property
    def ranker(self) -> Ranker:
        return self._model.ranker

    async def rank(self, request: Request, is_recorded: bool, timeout_s: float) -> Ranked:
        """Rank a request together with those of others.

        Args:
            is_recorded: take the history that is recorded instead of the request's.

        Raises:
            UserError: the request asks for what the model does not have.
            Overloaded, Expired: see :class:`Batcher`.
        """
        self.ranker.check(request)  # reads nothing that changes, so that it need not take turns
        return await self.batcher.submit(_Job(request, is_recorded), len(request.candidates), timeout_s)

    async def record(self, user: str, impressions: Sequence[Impression]) -> None:
        """Record what a user did; it counts in requests that begin once this has returned.

        Raises:
            UserError: an impression cannot be of the model's dataset.
            StoreError: it is not recorded.
        """
        self.ranker.check(Request(user, ["any"], history=impressions))
        await asyncio.wrap_future(self.store.append(user, impressions))
        self.metrics.impressions.inc(len(impressions))

    async def forget(self, user: str) -> int:
        """Delete what is recorded of a user: number of impressions. None counts in requests that begin afterwards.

        Raises:
            StoreError: it is not deleted.
        """
        count = await asyncio.wrap_future(self.store.forget(user))
        await asyncio.to_thread(self._model.histories.forget, user)
        return count

    async def recorded(self, user: str, last: int) -> list[Impression]:
        """The last impressions of a user, oldest first.

        Raises:
            StoreError: they cannot be read now.
        """
        _, impressions = await asyncio.to_thread(self.store.recent, user, last)
        return impressions

    async def some_users(self, count: int) -> list[str]:
        """Users of whom something is recorded.

        Raises:
            StoreError: they cannot be read now.
        """
        return await asyncio.to_thread(self.store.some_users, count)

    async def reload(self) -> tuple[str, str]:
        """Load the model again and put it in service between two batches, if it is another one.

        Returns:
            the versions in service now and before.

        Raises:
            ModelRejected: it cannot be loaded or does not rank; the former one stays in service.
        """
        async with self._reloading:
            former = self.ranker.version
            try:
                model = await asyncio.to_thread(self._loaded)
            except Exception as error:
                self.metrics.reloads.labels("rejected").inc()
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                log.error("model rejected, %s stays in service: %s", former, reason)
                raise ModelRejected(f"{reason}; {former} stays in service") from error
            if model.ranker.version == former:
                self.metrics.reloads.labels("same").inc()
                return former, former
            self._model = model  # the thread takes it with its next batch
            self.metrics.serving(model.ranker.version)
            self.metrics.reloads.labels("swapped").inc()
            log.warning("model %s in service, in place of %s", model.ranker.version, former)
            return model.ranker.version, former

    async def close(self) -> None:
        """Rank what waits, record what waits, and end."""
        self.draining = True
        await asyncio.to_thread(self.batcher.close, self.config.drain_s)
        await asyncio.to_thread(self.store.close)

    def _loaded(self) -> _Model:
        """The model that is to be served now, ready: what is slow the first time has been done."""
        ranker = self.load(model_folder(self.model), self.config.state_cache_mb * MIB)
        history = ranker.encode([Impression("", 0)])
        ranker.rank(Request("", ranker.some_items(WARM) or [""], history=history))
        return _Model(ranker, Histories(ranker, self.store, self.config.history_cache_mb * MIB))

    def _rank_batch(self, jobs: list[_Job]) -> list[Ranked | Exception]:
        """Results of one batch, all by one model."""
        model = self._model
        results: list[Ranked | Exception] = []
        made = [self._prepared(job, model) for job in jobs]
        good = [each for each in made if not isinstance(each, Exception)]
        ranked = iter(_ranked([request for request, _ in good], model.ranker))
        for each in made:
            if isinstance(each, Exception):
                results.append(each)
                continue
            answer = next(ranked)
            if isinstance(answer, Exception):
                results.append(answer)
                continue
            fallbacks = [*answer.fallbacks, *each[1]]
            for kind in fallbacks:
                self.metrics.fallbacks.labels(kind).inc()
            results.append(Ranked(answer, fallbacks))
        return results

    def _prepared(self, job: _Job, model: _Model) -> tuple[Request, list[str]] | Exception:
        """The request with its history, and what is amiss; an error where the model cannot do it."""
        try:
            if not job.is_recorded:
                model.ranker.check(job.request)  # again: another model may be in service than when it came
                return job.request, []
            try:
                past, amiss = model.histories.of(job.request.user, job.request.now_ms), []
            except StoreError:
                past, amiss = model.histories.nothing, ["history_unavailable"]
            request = replace(job.request, history=past, now_ms=_moment(job.request, past))
            model.ranker.check(request)
            return request, amiss
        except Exception as error:
            return error

    def _tell_of_caches(self) -> None:
        told = {
            "queue_candidates": ("candidates that wait", lambda: self.batcher.waiting),
            "state_cache_hits": ("states of past impressions found", lambda: self.ranker.cache.hits),
            "state_cache_misses": ("states of past impressions computed", lambda: self.ranker.cache.misses),
            "state_cache_bytes": ("memory of those kept", lambda: self.ranker.cache.bytes),
            "history_cache_hits": ("histories found as they were", lambda: self._model.histories.hits),
            "history_cache_extended": ("histories found and gone on with", lambda: self._model.histories.extended),
            "history_cache_misses": ("histories read and encoded", lambda: self._model.histories.misses),
            "history_cache_bytes": ("memory of those kept", lambda: self._model.histories.bytes),
        }
        for name, (about, value) in told.items():
            self.metrics.watch(name, about, value)


def _moment(request: Request, past: History) -> int:
    """When the user is there: now, if the request does not say. What is recorded has begun, whatever its clock said."""
    if request.now_ms is not None:
        return request.now_ms
    return max(clock_ms(), int(past.ts_ms[-1])) if len(past) else clock_ms()


def _ranked(requests: list[Request], ranker: Ranker) -> Sequence[RankedList | Exception]:
    """Answers in order. Should a batch fail, each is tried alone: no request spoils another's."""
    if not requests:
        return []
    try:
        return ranker.rank_many(requests)
    except Exception as error:
        if len(requests) == 1:
            return [error]
        return [answer for request in requests for answer in _ranked([request], ranker)]
