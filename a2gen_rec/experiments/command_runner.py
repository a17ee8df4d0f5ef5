"""Runner of ``a2gen`` commands in subprocesses that are terminated with this process."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths
from a2gen_rec.utils.signals import once_per_request

RunCommand = Callable[[Sequence[str], str], int]
"""Function that runs ``a2gen`` with arguments, appends its output to a file and returns the exit code."""


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


def check_command(run_command: RunCommand, arguments: Sequence[str], log: str, name: str = "") -> None:
    """Run an ``a2gen`` command.

    Args:
        run_command: Runner of commands.
        arguments: Arguments of the command.
        log: File that its output is appended to.
        name: Name in the error; by default the command's.

    Raises:
        UserError: It failed; the message has the last line of its output.
    """
    if code := run_command(arguments, log):
        lines = [line.strip() for line in paths.read_text(log).splitlines() if line.strip()]
        last = lines[-1].removeprefix("a2gen: error: ") if lines else "no output"
        raise UserError(f"{name or f'a2gen {arguments[0]}'} exited with code {code}: {last}; see {log}")


@contextmanager
def sigterm_as_keyboard_interrupt() -> Iterator[None]:
    """Translate SIGTERM to KeyboardInterrupt, so that subprocesses are stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Repeated, it would interrupt the commands that save their checkpoints.
    previous_handler = signal.signal(signal.SIGTERM, once_per_request(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def cli_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Return settings by name as options of a command."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
