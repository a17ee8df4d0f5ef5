"""Pool of ranking processes: with the GIL, one Python process uses one core for ranking."""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any
from zlib import crc32

from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.serving.engine.inference import InProcessBackend, RankJob, RankResult, lower_thread_priority
from a2gen_rec.serving.logs import configure_logging, format_location
from a2gen_rec.serving.stores.factory import open_store
from a2gen_rec.utils.malloc import disable_tcache_in_children
from a2gen_rec.utils.warning_filters import silence_known_warnings

if TYPE_CHECKING:
    from a2gen_rec.ranking.ranker import Ranker

RESTART_DELAY_S = 1.0
"""Seconds between attempts to restart a worker."""
SHUTDOWN_TIMEOUT_S = 10.0
"""Maximum seconds for workers to exit."""

log = logging.getLogger(__name__)


class WorkerDied(Exception):
    """A ranking process died; ``was_running`` is True if it had received the job."""

    def __init__(self, was_running: bool = False) -> None:
        super().__init__(was_running)
        self.was_running = was_running


class WorkerPool:
    """Backend like :class:`InProcessBackend` with ``config.num_workers`` processes that each hold the model.
    Thread-safe.

    If a worker dies, for example out of memory, its batch fails and the worker is restarted.

    Args:
        load: Function like :func:`load_ranker`.
        model_dir: Directory of the exported model.
        version: Expected version of the model.
        config: Settings.

    Raises:
        UserError: The model or the store cannot be used.
    """

    def __init__(self, load: Callable[[str, int], "Ranker"], model_dir: str, version: str, config: ServeConfig) -> None:
        self._worker_args, self._num_workers = (load, model_dir, config), config.num_workers
        self._version = version
        self._workers: list[_Worker] = []
        self._idle = _IdleWorkers()
        self._closed = False
        disable_tcache_in_children()
        atexit.register(self.close)  # otherwise this process would wait at exit for workers that wait for it
        try:
            self._workers += [_Worker(index, *self._worker_args) for index in range(config.num_workers)]
            for worker in self._workers:  # which load the model concurrently
                worker.wait_ready(version)
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """Number of live processes, see :class:`InProcessBackend`."""
        return sum(worker.is_ready for worker in list(self._workers))

    def rank(self, jobs: Sequence[RankJob]) -> list[RankResult | Exception]:
        """Rank on an idle worker, see :class:`InProcessBackend`; blocks until one is idle. Prefers the worker whose
        caches have the first job's user.

        Raises:
            WorkerDied: No worker is left.
        """
        preferred = crc32(jobs[0].request.user.encode("utf-8", "surrogatepass")) % self._num_workers
        while worker := self._idle.take(preferred):
            try:
                results: list[RankResult | Exception] = worker.call("rank", jobs)
            except WorkerDied as error:
                if self._closed:
                    break
                threading.Thread(target=self._replace, args=[worker], daemon=True).start()
                if error.was_running:
                    return [error] * len(jobs)
            else:
                self._idle.put(worker)
                return results
        raise WorkerDied

    def evict_history(self, user: str) -> None:
        """See :class:`InProcessBackend`."""
        for worker in list(self._workers):
            with suppress(WorkerDied):  # its cache died with it
                worker.call("evict_history", user)

    def cache_counts(self) -> dict[str, float]:
        """Return the sums of all workers as of their last batches, see :class:`InProcessBackend`."""
        counts: Counter[str] = Counter()
        for worker in list(self._workers):
            counts.update(worker.cache_counts)
        return dict(counts)

    def close(self) -> None:
        """Stop the processes after their current batches; those that take too long are killed."""
        self._closed = True
        atexit.unregister(self.close)
        _terminate(self._workers)
        self._idle.close()

    def _replace(self, dead: "_Worker") -> None:
        _terminate([dead])
        log.error("ranking worker exited (status %s); restarting", dead.exit_status)
        self._workers.remove(dead)
        while not self._closed:
            worker = None
            try:
                worker = _Worker(dead.index, *self._worker_args)
                self._workers.append(worker)
                worker.wait_ready(self._version)
                self._idle.put(worker)
                log.warning("ranking worker restarted")
                break
            except Exception as error:  # of any kind: the pool keeps trying
                if self._closed:
                    break
                reason = str(error) if isinstance(error, UserError) else type(error).__name__
                log.error("restart failed, retrying: %s", reason)
                if worker is not None:
                    self._workers.remove(worker)
                    _terminate([worker])
                time.sleep(RESTART_DELAY_S)
        if self._closed:
            _terminate(self._workers)


class _IdleWorkers:
    """Idle workers, and threads that wait for one."""

    def __init__(self) -> None:
        self._free: list[_Worker] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, worker: "_Worker") -> None:
        with self._changed:
            self._free.append(worker)
            self._changed.notify()

    def take(self, preferred: int) -> "_Worker | None":
        """Return the worker of that index if it is idle, otherwise the longest idle one; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                return None
            worker = next((worker for worker in self._free if worker.index == preferred), self._free[0])
            self._free.remove(worker)
            return worker

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Worker:
    """One process that executes method calls of an :class:`InProcessBackend`.

    Attributes:
        index: Index from 0; the replacement of a worker has the same one.
        is_ready: Whether it accepts calls.
        cache_counts: :meth:`InProcessBackend.cache_counts` as of the last call.
    """

    def __init__(self, index: int, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks that no thread releases
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(
            target=_worker_main, args=(child_pipe, index, *args), name="inference", daemon=True
        )
        self._process.start()
        child_pipe.close()
        self.index, self.is_ready, self.cache_counts = index, False, dict[str, float]()
        self._lock = threading.Lock()

    @property
    def exit_status(self) -> int | None:
        return self._process.exitcode

    def wait_ready(self, version: str) -> None:
        """Wait until the model is loaded.

        Raises:
            UserError: The worker failed to start, or loaded another version of the model.
        """
        try:
            failure, loaded, counts = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(SHUTDOWN_TIMEOUT_S)
            raise UserError(f"ranking worker exited during startup (status {self.exit_status})") from None
        if failure:
            raise UserError(failure)
        if loaded != version:
            raise UserError(f"model changed from {version} to {loaded} during startup")
        self.cache_counts, self.is_ready = counts, True

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a method of the backend. Raises WorkerDied if the process is not ready, has died, or dies meanwhile."""
        with self._lock:
            if not self.is_ready:
                raise WorkerDied
            try:
                self._pipe.send((name, arguments))
            except OSError:
                self.is_ready = False
                raise WorkerDied from None
            try:
                result, self.cache_counts = self._pipe.recv()
            except Exception:
                self.is_ready = False
                raise WorkerDied(was_running=True) from None
        return result

    def request_exit(self, deadline: float) -> None:
        """Let the process exit after its current call, or kill it if that lasts beyond ``deadline``."""
        if self.is_ready and self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self.is_ready = False
            self._pipe.close()
            self._lock.release()
        elif self._process.is_alive():
            self._process.kill()

    def join(self, deadline: float) -> None:
        """Wait for the exit of the process, and kill it after ``deadline``."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _terminate(workers: Sequence[_Worker]) -> None:
    deadline, exiting = time.monotonic() + SHUTDOWN_TIMEOUT_S, list(workers)
    for worker in exiting:
        worker.request_exit(deadline)
    for worker in exiting:
        worker.join(deadline)


def _worker_main(
    pipe: Connection, index: int, load: Callable[[str, int], "Ranker"], model_dir: str, config: ServeConfig
) -> None:
    """Execute calls until the other end of the pipe is closed."""
    # Terminals and supervisors send these signals to all processes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    silence_known_warnings()
    configure_logging()
    lower_thread_priority()
    pin_to_core(index, config.num_workers)
    with suppress(EOFError, OSError):
        try:
            ranker, store = load(model_dir, config.action_cache_bytes), open_store(config.event_store)
            backend = InProcessBackend(ranker, store, config.history_cache_bytes)
        except Exception as error:
            pipe.send((str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", "", {}))
            os._exit(1)
        pipe.send((None, ranker.version, backend.cache_counts()))
        with suppress(EOFError):
            while True:
                name, arguments = pipe.recv()
                result = getattr(backend, name)(*arguments)
                reply = [_picklable_error(item) for item in result] if isinstance(result, list) else result
                pipe.send((reply, backend.cache_counts()))
        store.close()
    os._exit(0)  # nothing is left to clean up, and some extensions print errors at exit


def pin_to_core(index: int, num_workers: int) -> None:
    """Pin a worker to a core, if there are exactly as many workers as cores available to this process.

    The kernel would sometimes run two of them on one core, and the event loop on the other. With fewer workers than
    cores, the kernel's placement is better.
    """
    if sys.platform == "linux" and num_workers == len(cores := os.sched_getaffinity(0)):
        with suppress(OSError):  # the cores have changed, or the parent process does not permit it
            os.sched_setaffinity(0, {sorted(cores)[index]})


def _picklable_error(result: RankResult | Exception) -> RankResult | Exception:
    """Return a result that can be sent to another process; an error other than a UserError is reduced to its type."""
    if not isinstance(result, Exception) or isinstance(result, UserError):
        return result
    log.error("%s in ranking\n%s", type(result).__name__, format_location(result))
    return RuntimeError(type(result).__name__)
