"""The ranking service, whatever carries its requests: one model in service, batches of requests, recorded histories."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from a2gen_rec.artifact.artifact import resolve_model_dir
from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.ranking.window import now_ms
from a2gen_rec.serving.engine.batching import DynamicBatcher
from a2gen_rec.serving.engine.inference import InProcessBackend, RankJob, RankResult, lower_thread_priority
from a2gen_rec.serving.engine.workers import WorkerDied, WorkerPool
from a2gen_rec.serving.metrics import Metrics
from a2gen_rec.serving.stores.base import EventStore
from a2gen_rec.utils.malloc import freeze_gc

MAX_CLOCK_SKEW_MS = 86_400_000
"""How far a clock may be ahead: what is recorded of a later moment would count as the present for as long."""

log = logging.getLogger(__name__)


class ModelLoadError(Exception):
    """A model cannot be put in service; the former one stays."""


@dataclass(frozen=True)
class _Model:
    """What is swapped as one: a model that tells what requests may have, and the same one ranking."""

    ranker: Ranker
    inference: InProcessBackend | WorkerPool


@dataclass
class RankingService:
    """Ranks and records; made and used in one event loop, but for the batches: a thread of its own does them, or
    processes do.

    Args:
        model: folder of an exported model, a link to one, or a folder whose ``CURRENT`` names one.
        load: as ``Ranker.load``.

    Raises:
        UserError: the model cannot be used.
    """

    model: str
    store: EventStore
    config: ServeConfig = field(default_factory=ServeConfig)
    load: Callable[[str, int], Ranker] = Ranker.load
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    """Whether the service is about to end: it answers still, but wants no more requests."""

    def __post_init__(self) -> None:
        config = self.config
        self._model = self._ready(*self._read())
        self.metrics.set_model_version(self.ranker.version)
        self.batcher: DynamicBatcher[RankJob, RankResult] = DynamicBatcher(
            self._rank_batch,
            config.batch_delay_ms / 1000,
            config.max_batch_candidates,
            config.max_queued_candidates,
            config.max_backlog_ms / 1000,
            self.metrics.observe_batch,
            config.num_workers,
            lower_thread_priority
            if config.num_workers == 1
            else lambda: None,  # threads that wait for processes are in no way
        )
        self._reloading = asyncio.Lock()
        self._register_cache_metrics()

    @property
    def ranker(self) -> Ranker:
        return self._model.ranker

    @property
    def is_ready(self) -> bool:
        """Whether anything can rank now."""
        return self._model.inference.workers > 0

    async def rank(self, request: RankQuery, is_recorded: bool, timeout_s: float) -> RankResult:
        """Rank a request together with those of others.

        Args:
            is_recorded: take the history that is recorded instead of the request's.

        Raises:
            UserError: the request asks for what the model does not have.
            Overloaded, Expired: see :class:`Batcher`.
        """
        self.ranker.validate(request)  # reads nothing that changes, so that it need not take turns
        return await self.batcher.submit(RankJob(request, is_recorded), len(request.candidates), timeout_s)

    async def record_impressions(self, user: str, impressions: Sequence[Impression]) -> None:
        """Record what a user did; it counts in requests that begin once this has returned.

        Raises:
            UserError: an impression cannot be of the model's dataset, or of this time.
            StoreError: it is not recorded.
        """
        if any(each.ts_ms > now_ms() + MAX_CLOCK_SKEW_MS for each in impressions):
            raise UserError("an impression begins more than a day from now; ts_ms is milliseconds since 1970")
        self.ranker.validate(RankQuery(user, ["any"], history=impressions))
        await asyncio.wrap_future(self.store.put(user, impressions))
        self.metrics.impressions.inc(len(impressions))

    async def delete_history(self, user: str) -> int:
        """Delete what is recorded of a user: number of impressions. None counts in requests that begin afterwards.

        Raises:
            StoreError: it is not deleted.
        """
        count = await asyncio.wrap_future(self.store.delete_user(user))
        await asyncio.to_thread(self._model.inference.forget, user)
        return count

    async def get_history(self, user: str, last: int) -> list[Impression]:
        """The last impressions of a user, oldest first.

        Raises:
            StoreError: they cannot be read now.
        """
        _, impressions = await asyncio.to_thread(self.store.get_recent, user, last)
        return impressions

    async def sample_users(self, count: int) -> list[str]:
        """Users of whom something is recorded.

        Raises:
            StoreError: they cannot be read now.
        """
        return await asyncio.to_thread(self.store.sample_users, count)

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
                folder, ranker = await asyncio.to_thread(self._read)
                is_new = ranker.version != former
                model = await asyncio.to_thread(self._ready, folder, ranker) if is_new else self._model
            except Exception as error:
                self.metrics.reloads.labels("rejected").inc()
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                log.error("model rejected, %s stays in service: %s", former, reason)
                raise ModelLoadError(f"{reason}; {former} stays in service") from error
            if not is_new:
                self.metrics.reloads.labels("same").inc()
                return former, former
            replaced, self._model = self._model, model  # it is taken with the next batch
            self.metrics.set_model_version(model.ranker.version)
            self.metrics.reloads.labels("swapped").inc()
            log.warning("model %s in service, in place of %s", model.ranker.version, former)
            await asyncio.to_thread(replaced.inference.close)
            return model.ranker.version, former

    async def close(self) -> None:
        """Rank what waits, record what waits, and end."""
        self.draining = True
        await asyncio.to_thread(self.batcher.close, self.config.graceful_timeout_s)
        await asyncio.to_thread(self._model.inference.close)
        await asyncio.to_thread(self.store.close)

    def _read(self) -> tuple[str, Ranker]:
        """The model that is to be served now, and its folder; what workers rank with is a copy of their own."""
        folder, config = resolve_model_dir(self.model), self.config
        return folder, self.load(folder, config.action_cache_bytes if config.num_workers == 1 else 0)

    def _ready(self, folder: str, ranker: Ranker) -> _Model:
        config = self.config
        if config.num_workers == 1:
            return _Model(ranker, InProcessBackend(ranker, self.store, config.history_cache_bytes))
        freeze_gc()
        return _Model(ranker, WorkerPool(self.load, folder, ranker.version, config))

    def _rank_batch(self, jobs: list[RankJob]) -> list[RankResult | Exception]:
        """Results of one batch, all by one model."""
        try:
            results = self._model.inference.rank(jobs)
        except WorkerDied:  # of a model that has just made way
            results = self._model.inference.rank(jobs)
        for each in results:
            for kind in each.fallbacks if isinstance(each, RankResult) else []:
                self.metrics.fallbacks.labels(kind).inc()
        return results

    def _register_cache_metrics(self) -> None:
        told = {
            "state_cache_hits": "states of past impressions found",
            "state_cache_misses": "states of past impressions computed",
            "state_cache_bytes": "memory of those kept",
            "history_cache_hits": "histories found as they were",
            "history_cache_extended": "histories found and gone on with",
            "history_cache_misses": "histories read and encoded",
            "history_cache_bytes": "memory of those kept",
        }
        self.metrics.add_gauge("workers", "batches that can be ranked at a time", lambda: self._model.inference.workers)
        self.metrics.add_gauge("queue_candidates", "candidates that wait", lambda: self.batcher.waiting)
        for name, about in told.items():
            self.metrics.add_gauge(name, about, partial(self._count, name))

    def _count(self, name: str) -> float:
        return self._model.inference.counts().get(name, 0)
