"""A model that ranks in processes of its own: Python runs one thread at a time, so that one process uses one core."""

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
from typing import Any
from zlib import crc32

from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.serving.engine.inference import InProcessBackend, RankJob, RankResult, lower_thread_priority
from a2gen_rec.serving.logs import configure_logging, format_location
from a2gen_rec.serving.stores.factory import open_store
from a2gen_rec.utils.malloc import disable_tcache_in_children
from a2gen_rec.utils.warning_filters import silence_known_warnings

RESTART_DELAY_S = 1.0
"""Between attempts to replace a worker that has ended."""
SHUTDOWN_TIMEOUT_S = 10.0
"""For which workers may take to end once they are told to."""

log = logging.getLogger(__name__)


class WorkerDied(Exception):
    """The process that was to rank has ended; ``begun`` tells whether it had been given the work."""

    def __init__(self, begun: bool = False) -> None:
        super().__init__(begun)
        self.was_running = begun


class WorkerPool:
    """As :class:`Inference`, in ``config.workers`` processes that each hold the model. Any thread may call.

    A worker that ends, for want of memory say, takes the batch that it ranks with it, and is replaced.

    Args:
        load: as ``Ranker.load``; folder: of the exported model; version: which it must be.

    Raises:
        UserError: the model or the store cannot be used.
    """

    def __init__(self, load: Callable[[str, int], Ranker], folder: str, version: str, config: ServeConfig) -> None:
        self._of, self._count = (load, folder, config), config.num_workers
        self._version = version
        self._all: list[_Worker] = []
        self._idle = _IdleWorkers()
        self._closed = False
        disable_tcache_in_children()
        atexit.register(self.close)  # else the end of this process would wait for workers that wait for it
        try:
            self._all += [_Worker(each, *self._of) for each in range(config.num_workers)]  # which load at the same time
            for worker in self._all:
                worker.wait(version)
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """See :class:`Inference`: processes that are there."""
        return sum(worker.is_ready for worker in list(self._all))

    def rank(self, jobs: Sequence[RankJob]) -> list[RankResult | Exception]:
        """See :class:`Inference`; by a worker that is free, for which this waits: if it can be, the one that keeps what
        it knows of the first job's user.

        Raises:
            WorkerLost: there are none any more.
        """
        wanted = crc32(jobs[0].request.user.encode("utf-8", "surrogatepass")) % self._count
        while worker := self._idle.take(wanted):
            try:
                results: list[RankResult | Exception] = worker.call("rank", jobs)
            except WorkerDied as lost:
                if self._closed:
                    break
                threading.Thread(target=self._replace, args=[worker], daemon=True).start()
                if lost.was_running:
                    return [lost] * len(jobs)
            else:
                self._idle.put(worker)
                return results
        raise WorkerDied

    def forget(self, user: str) -> None:
        """See :class:`Inference`."""
        for worker in list(self._all):
            with suppress(WorkerDied):  # and with it what it kept
                worker.call("forget", user)

    def counts(self) -> dict[str, float]:
        """See :class:`Inference`: of all workers, as of their last batches."""
        counts: Counter[str] = Counter()
        for worker in list(self._all):
            counts.update(worker.counts)
        return dict(counts)

    def close(self) -> None:
        """End the processes, each after the batch that it ranks; one that takes too long is killed."""
        self._closed = True
        atexit.unregister(self.close)
        _terminate(self._all)
        self._idle.close()

    def _replace(self, lost: "_Worker") -> None:
        _terminate([lost])
        log.error("a process that ranked has ended (exit status %s): replacing it", lost.exit_status)
        self._all.remove(lost)
        while not self._closed:
            worker = None
            try:
                worker = _Worker(lost.number, *self._of)
                self._all.append(worker)
                worker.wait(self._version)
                self._idle.put(worker)
                log.warning("another process ranks in its place")
                break
            except Exception as error:  # of any kind: there must be one some time
                if self._closed:
                    break
                reason = str(error) if isinstance(error, UserError) else type(error).__name__
                log.error("no process in its place yet: %s", reason)
                if worker is not None:
                    self._all.remove(worker)
                    _terminate([worker])
                time.sleep(RESTART_DELAY_S)
        if self._closed:
            _terminate(self._all)


class _IdleWorkers:
    """Workers that are free, and threads that wait for one."""

    def __init__(self) -> None:
        self._free: list[_Worker] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, worker: "_Worker") -> None:
        with self._changed:
            self._free.append(worker)
            self._changed.notify()

    def take(self, wanted: int) -> "_Worker | None":
        """The worker of that number if it is free, else the one that has been for longest; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                return None
            worker = next((worker for worker in self._free if worker.number == wanted), self._free[0])
            self._free.remove(worker)
            return worker

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Worker:
    """One process, which answers calls of an :class:`Inference`'s methods.

    Attributes:
        number: from 0, which a process that takes its place has too.
        is_ready: whether it may be called; counts: of :meth:`Inference.counts`, as of the last call.
    """

    def __init__(self, number: int, *of: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have locks that nobody opens
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_worker_main, args=(theirs, number, *of), name="inference", daemon=True)
        self._process.start()
        theirs.close()
        self.number, self.is_ready, self.counts = number, False, dict[str, float]()
        self._lock = threading.Lock()

    @property
    def exit_status(self) -> int | None:
        return self._process.exitcode

    def wait(self, version: str) -> None:
        """Until it can rank.

        Raises:
            UserError: it cannot, or has loaded another model than that of this version.
        """
        try:
            failed, found, counts = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(SHUTDOWN_TIMEOUT_S)
            raise UserError(f"a process that was to rank has ended (exit status {self.exit_status})") from None
        if failed:
            raise UserError(failed)
        if found != version:
            raise UserError(f"the model has been replaced by {found} where {version} was")
        self.counts, self.is_ready = counts, True

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises WorkerLost if it ends meanwhile, has ended, or is not ready."""
        with self._lock:
            if not self.is_ready:
                raise WorkerDied
            try:
                self._pipe.send((name, arguments))
            except OSError:
                self.is_ready = False
                raise WorkerDied from None
            try:
                result, self.counts = self._pipe.recv()
            except Exception:
                self.is_ready = False
                raise WorkerDied(begun=True) from None
        return result

    def leave(self, until: float) -> None:
        """Tell it to end after the call that it answers, if that is by ``until``."""
        if self.is_ready and self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            self.is_ready = False
            self._pipe.close()
            self._lock.release()
        elif self._process.is_alive():
            self._process.kill()

    def join(self, until: float) -> None:
        """Wait for its end, and make sure of it."""
        self._process.join(max(0.0, until - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _terminate(workers: Sequence[_Worker]) -> None:
    until, ending = time.monotonic() + SHUTDOWN_TIMEOUT_S, list(workers)
    for worker in ending:
        worker.leave(until)
    for worker in ending:
        worker.join(until)


def _worker_main(
    pipe: Connection, number: int, load: Callable[[str, int], Ranker], folder: str, config: ServeConfig
) -> None:
    """Answer calls until nobody is left to make any."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which a terminal or supervisor may send to all
        signal.signal(each, signal.SIG_IGN)
    silence_known_warnings()
    configure_logging()
    lower_thread_priority()
    pin_to_core(number, config.num_workers)
    with suppress(EOFError, OSError):
        try:
            ranker, store = load(folder, config.action_cache_bytes), open_store(config.event_store)
            inference = InProcessBackend(ranker, store, config.history_cache_bytes)
        except Exception as error:
            pipe.send((str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", "", {}))
            os._exit(1)
        pipe.send((None, ranker.version, inference.counts()))
        with suppress(EOFError):
            while True:
                name, arguments = pipe.recv()
                result = getattr(inference, name)(*arguments)
                told = [_picklable_error(each) for each in result] if isinstance(result, list) else result
                pipe.send((told, inference.counts()))
        store.close()
    os._exit(0)  # nothing is left to tidy up, but for what extensions complain of


def pin_to_core(number: int, workers: int) -> None:
    """Where workers have all cores of this process and just one each, let each keep to its own.

    The kernel would have two of them share one now and then, with what the event loop does on the other. With fewer
    workers than cores, it knows better.
    """
    if sys.platform == "linux" and workers == len(cores := os.sched_getaffinity(0)):
        with suppress(OSError):  # the cores have changed, or who started this process does not allow it
            os.sched_setaffinity(0, {sorted(cores)[number]})


def _picklable_error(result: RankResult | Exception) -> RankResult | Exception:
    """What can be sent to another process: of an error that is not a caller's, its kind."""
    if not isinstance(result, Exception) or isinstance(result, UserError):
        return result
    log.error("%s in ranking\n%s", type(result).__name__, format_location(result))
    return RuntimeError(type(result).__name__)
