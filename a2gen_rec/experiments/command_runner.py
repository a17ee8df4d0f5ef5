"""Runner of ``a2gen`` commands in subprocesses that are terminated with this process."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class CommandRunner:
    """Thread-safe runner of commands.

    Attributes:
        stopped: Whether :meth:`stop` was called.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self.stopped = False

    def __call__(self, arguments: Sequence[str], log: str) -> int:
        """Run ``a2gen`` with ``arguments`` on one thread and append its output to ``log``; return its exit code.

        One thread per command: throughput is highest with as many concurrent commands as cores.
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
        """Terminate all running commands and start no more; training saves a checkpoint first."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


@contextmanager
def sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """Translate SIGTERM to KeyboardInterrupt, so that subprocesses are stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous_handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def cli_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return settings by name as options of a command."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
