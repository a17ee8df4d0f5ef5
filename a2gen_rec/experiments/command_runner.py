"""Commands of `a2gen` in processes of their own, several at a time, which end with this one."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class CommandRunner:
    """Runs commands, and stops those that run. Threads may share it."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def __call__(self, arguments: Sequence[str], log: str) -> int:
        """Run ``a2gen`` with ``arguments``, its output at the end of the file ``log``; returns its exit code.

        On one thread: as many at a time as the machine has cores is what makes the most of them.
        """
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "a2gen_rec.cli", *arguments]
        with Path(log).open("ab") as output:
            with self._lock:
                if self.stopped:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                self._running.add(process)
            try:
                return process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """Ask all that run to stop, which training does with a checkpoint, and start no more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


@contextmanager
def sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that what was started is stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
