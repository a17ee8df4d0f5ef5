"""Transport-independent ranking service: the model in service, request batching and stored histories."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from a2gen_rec.artifact.model_dir import resolve_model_dir
from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.ranking.window import now_ms
from a2gen_rec.serving.engine.batching import DynamicBatcher
from a2gen_rec.serving.engine.inference import (
    InProcessBackend,
    RankJob,
    RankResult,
    load_ranker,
    lower_thread_priority,
)
from a2gen_rec.serving.engine.workers import WorkerDied, WorkerPool
from a2gen_rec.serving.metrics import Metrics
from a2gen_rec.serving.stores.base import EventStore
from a2gen_rec.utils.malloc import freeze_gc

if TYPE_CHECKING:
    from a2gen_rec.ranking.ranker import Ranker

MAX_CLOCK_SKEW_MS = 86_400_000
"""Maximum lead of a client's clock. Stored impressions of later times would define the query time for as long."""

log = logging.getLogger(__name__)


class ModelLoadError(Exception):
    """A model cannot be loaded; the previous one stays in service."""


@dataclass(frozen=True)
class _LoadedModel:
    """Unit of a model swap: the ranker that validates requests and the backend that ranks them with the same model."""

    ranker: "Ranker"
    backend: InProcessBackend | WorkerPool


@dataclass
class RankingService:
    """Ranks candidates and records impressions. Used from one event loop; batches run in threads or processes.

    Args:
        model: Model directory, a symlink to one, or a directory whose ``CURRENT`` file names one.
        open_store: Opens the event store, once the model is loaded: a missing model creates no store.
        config: Settings.
        load: Function like :func:`load_ranker`.
        metrics: Metrics of the service.

    Raises:
        UserError: The model or the store cannot be used.
    """

    model: str
    open_store: Callable[[], EventStore]
    config: ServeConfig = field(default_factory=ServeConfig)
    load: Callable[[str, int], "Ranker"] = load_ranker
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    """Whether the service is shutting down: it still serves requests, but is not ready for more."""

    def __post_init__(self) -> None:
        config = self.config
        model_dir, ranker = self._load()
        self.store = self.open_store()
        try:
            self._model = self._prepare(model_dir, ranker)
        except BaseException:
            self.store.close()
            raise
        self.metrics.set_model_version(self.ranker.version)
        self.batcher: DynamicBatcher[RankJob, RankResult] = DynamicBatcher(
            self._rank_batch,
            config.batch_delay_ms / 1000,
            config.max_batch_candidates,
            config.max_queued_candidates,
            config.max_backlog_ms / 1000,
            self.metrics.observe_batch,
            config.num_workers,
            lower_thread_priority if config.num_workers == 1 else lambda: None,  # other threads only wait for processes
        )
        self._reloading = asyncio.Lock()
        self._register_cache_metrics()

    @property
    def ranker(self) -> "Ranker":
        return self._model.ranker

    @property
    def is_ready(self) -> bool:
        """Whether any worker can rank now."""
        return self._model.backend.num_workers > 0

    async def rank(self, request: RankQuery, use_stored_history: bool, timeout_s: float) -> RankResult:
        """Rank a request in a batch with others.

        Args:
            request: The request.
            use_stored_history: Whether to use the stored history instead of the request's.
            timeout_s: Deadline in seconds.

        Raises:
            UserError: The request does not match the model.
            QueueFull, DeadlineExceeded: See :class:`DynamicBatcher`.
        """
        self.ranker.validate(request)  # reads only immutable state, so it needs no lock
        return await self.batcher.submit(RankJob(request, use_stored_history), len(request.candidates), timeout_s)

    async def record_impressions(self, user: str, impressions: Sequence[Impression]) -> None:
        """Store impressions of a user. They count in all requests that start after the return.

        Raises:
            UserError: An impression does not match the model's dataset, or its time is in another unit or too far in
                the future.
            StoreError: The impressions are not stored.
        """
        if any(impression.ts_ms > now_ms() + MAX_CLOCK_SKEW_MS for impression in impressions):
            raise UserError("ts_ms is more than one day in the future; it must be milliseconds since 1970")
        self.ranker.validate(RankQuery(user, ["any"], history=impressions))
        await asyncio.wrap_future(self.store.put(user, impressions))
        self.metrics.impressions.inc(len(impressions))

    async def delete_history(self, user: str) -> tuple[int, bool | None]:
        """Delete all impressions of a user. None counts in requests that start afterwards.

        Returns:
            The number of impressions, and whether all deleted content is overwritten in the store's files, None if
            unknown.

        Raises:
            StoreError: The impressions are not deleted.
        """
        count = await asyncio.wrap_future(self.store.delete_user(user))
        await asyncio.to_thread(self._model.backend.evict_history, user)
        return count, self.store.is_overwritten

    async def get_history(self, user: str, limit: int) -> list[Impression]:
        """Return the most recent impressions of a user, oldest first.

        Raises:
            StoreError: The store cannot be read.
        """
        _, impressions = await asyncio.to_thread(self.store.get_recent, user, limit)
        return impressions

    async def sample_users(self, count: int) -> list[str]:
        """Return some users with stored impressions.

        Raises:
            StoreError: The store cannot be read.
        """
        return await asyncio.to_thread(self.store.sample_users, count)

    async def reload(self) -> tuple[str, str]:
        """Reload the model. A new version replaces the model in service between two batches.

        Returns:
            The current and the previous version.

        Raises:
            ModelLoadError: The model cannot be loaded or fails to rank; the previous one stays in service.
        """
        async with self._reloading:
            previous = self.ranker.version
            try:
                model_dir, ranker = await asyncio.to_thread(self._load)
                is_new = ranker.version != previous
                model = await asyncio.to_thread(self._prepare, model_dir, ranker) if is_new else self._model
            except Exception as error:
                self.metrics.reloads.labels("rejected").inc()
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                log.error("model reload failed, keeping %s: %s", previous, reason)
                raise ModelLoadError(f"{reason}; keeping {previous}") from error
            if not is_new:
                self.metrics.reloads.labels("same").inc()
                return previous, previous
            replaced, self._model = self._model, model  # effective from the next batch
            self.metrics.set_model_version(model.ranker.version)
            self.metrics.reloads.labels("swapped").inc()
            log.warning("model %s loaded, replacing %s", model.ranker.version, previous)
            await asyncio.to_thread(replaced.backend.close)
            return model.ranker.version, previous

    async def close(self) -> None:
        """Complete queued rankings and pending writes, and shut down."""
        self.draining = True
        await asyncio.to_thread(self.batcher.close, self.config.graceful_timeout_s)
        await asyncio.to_thread(self._model.backend.close)
        await asyncio.to_thread(self.store.close)

    def _load(self) -> tuple[str, "Ranker"]:
        """Return the directory of the model to serve, and its ranker; worker processes load copies of their own."""
        model_dir, config = resolve_model_dir(self.model), self.config
        return model_dir, self.load(model_dir, config.action_cache_bytes if config.num_workers == 1 else 0)

    def _prepare(self, model_dir: str, ranker: "Ranker") -> _LoadedModel:
        config = self.config
        if config.num_workers == 1:
            return _LoadedModel(ranker, InProcessBackend(ranker, self.store, config.history_cache_bytes))
        freeze_gc()
        return _LoadedModel(ranker, WorkerPool(self.load, model_dir, ranker.version, config))

    def _rank_batch(self, jobs: list[RankJob]) -> list[RankResult | Exception]:
        """Return the results of one batch, all by one model."""
        try:
            results = self._model.backend.rank(jobs)
        except WorkerDied:  # the model was replaced just now
            results = self._model.backend.rank(jobs)
        for result in results:
            for kind in result.fallbacks if isinstance(result, RankResult) else []:
                self.metrics.degraded_rankings.labels(kind).inc()
        return results

    def _register_cache_metrics(self) -> None:
        descriptions = {
            "state_cache_hits": "action-level states found in the cache",
            "state_cache_misses": "action-level states computed",
            "state_cache_bytes": "memory of the cached action-level states",
            "history_cache_hits": "histories found unchanged in the cache",
            "history_cache_extended": "cached histories extended with new impressions",
            "history_cache_misses": "histories read and encoded",
            "history_cache_bytes": "memory of the cached histories",
        }
        num_workers, queued = (lambda: self._model.backend.num_workers), (lambda: self.batcher.queued)
        self.metrics.add_gauge("workers", "batches that can be ranked at a time", num_workers)
        self.metrics.add_gauge("queue_candidates", "candidates in the ranking queue", queued)
        for name, description in descriptions.items():
            self.metrics.add_gauge(name, description, partial(self._cache_count, name))

    def _cache_count(self, name: str) -> float:
        return self._model.backend.cache_counts().get(name, 0)
