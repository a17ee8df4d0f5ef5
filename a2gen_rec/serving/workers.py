"""A model that ranks in processes of its own: Python runs one thread at a time, so that one process uses one core."""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from a2gen_rec.config.serving import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.quiet import quiet
from a2gen_rec.serving.inference import Inference, Job, Ranked, cache_bytes, yield_to_others
from a2gen_rec.serving.logs import log_to_stderr, where
from a2gen_rec.serving.ranker import Ranker
from a2gen_rec.serving.store import open_store

AGAIN_S = 1.0
"""Between attempts to replace a worker that has ended."""
END_S = 10.0
"""For which a worker may take to end once it is told to."""

log = logging.getLogger(__name__)


class WorkerLost(Exception):
    """The process that ranked has ended."""


class Workers:
    """As :class:`Inference`, in ``config.workers`` processes that each hold the model. Any thread may call.

    A worker that ends, for want of memory say, takes its batch with it and is replaced.

    Args:
        load: as ``Ranker.load``; folder: of the exported model.

    Raises:
        UserError: the model or the store cannot be used.
    """

    def __init__(self, load: Callable[[str, int], Ranker], folder: str, config: ServeConfig) -> None:
        self._workers = [_Worker(load, folder, config) for _ in range(config.workers)]
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()  # None: there will be no more
        self._closed = False
        try:
            for worker in self._workers:  # all load at once
                worker.start()
            for worker in self._workers:
                worker.wait()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def rank(self, jobs: Sequence[Job]) -> list[Ranked | Exception]:
        """See :class:`Inference`; by a worker that is free, for which this waits.

        Raises:
            WorkerLost: there are none any more.
        """
        worker = self._idle.get()
        if worker is None:
            self._idle.put(None)
            raise WorkerLost
        try:
            results: list[Ranked | Exception] = worker.call("rank", jobs)
        except WorkerLost as lost:
            if self._closed:
                raise
            threading.Thread(target=self._replace, args=[worker], daemon=True).start()
            return [lost] * len(jobs)
        self._idle.put(worker)
        return results

    def forget(self, user: str) -> None:
        """See :class:`Inference`."""
        for worker in self._workers:
            with suppress(WorkerLost):  # and with it what it kept
                worker.call("forget", user)

    def counts(self) -> dict[str, float]:
        """See :class:`Inference`: of all workers, as of their last batches."""
        every = [worker.counts for worker in self._workers]
        return {name: sum(counts.get(name, 0) for counts in every) for name in every[0]}

    def close(self) -> None:
        """End the processes, each after the batch that it ranks."""
        self._closed = True
        for worker in self._workers:
            worker.end()
        self._idle.put(None)

    def _replace(self, worker: "_Worker") -> None:
        log.error("a process that ranked has ended (exit status %s): replacing it", worker.end())
        while not self._closed:
            try:
                worker.start()
                worker.wait()
                self._idle.put(worker)
                break
            except UserError as error:
                log.error("no process in its place: %s", error)
                time.sleep(AGAIN_S)
        if self._closed:
            worker.end()


class _Worker:
    """One process, which answers calls of an :class:`Inference`'s methods."""

    def __init__(self, *of: Any) -> None:
        self.of, self.counts = of, dict[str, float]()
        self._lock = threading.Lock()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have locks that nobody opens
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self.of), name="inference", daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it can rank.

        Raises:
            UserError: it cannot.
        """
        try:
            failed, self.counts = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError(f"a process that was to rank has ended (exit status {self.end()})") from None
        if failed:
            raise UserError(failed)

    def call(self, name: str, *arguments: Any) -> Any:
        """Raises WorkerLost if it ends meanwhile, or has ended."""
        with self._lock:
            try:
                self._pipe.send((name, arguments))
                result, self.counts = self._pipe.recv()
            except (EOFError, OSError):
                raise WorkerLost from None
        return result

    def end(self) -> int | None:
        """Tell it to end once it has answered, and wait: its exit status, None if it was never begun."""
        if not hasattr(self, "_process"):
            return None
        with self._lock:
            self._pipe.close()
        self._process.join(END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _work(pipe: Connection, load: Callable[[str, int], Ranker], folder: str, config: ServeConfig) -> None:
    """Answer calls until nobody is left to make any."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which a terminal or supervisor may send to all
        signal.signal(number, signal.SIG_IGN)
    quiet()
    log_to_stderr()
    yield_to_others()
    try:
        history_cache, state_cache = cache_bytes(config)
        ranker, store = load(folder, state_cache), open_store(config.store)
        inference = Inference(ranker, store, history_cache)
    except Exception as error:
        pipe.send((str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}", {}))
        return
    pipe.send((None, inference.counts()))
    with suppress(EOFError, OSError):
        while True:
            name, arguments = pipe.recv()
            result = getattr(inference, name)(*arguments)
            pipe.send(([_told(each) for each in result] if isinstance(result, list) else result, inference.counts()))
    store.close()
    os._exit(0)  # nothing is left to tidy up, but for what extensions complain of


def _told(result: Ranked | Exception) -> Ranked | Exception:
    """What can be sent to another process: of an error that is not a caller's, its kind."""
    if not isinstance(result, Exception) or isinstance(result, UserError):
        return result
    log.error("%s in ranking\n%s", type(result).__name__, where(result))
    return RuntimeError(type(result).__name__)
