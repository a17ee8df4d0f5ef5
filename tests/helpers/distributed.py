"""Run functions and commands on several ranks, one forked process each.

The ranks are forked from a process that has imported torch and the training code once. torchrun starts an interpreter
per rank and one for itself, which cost about four seconds of CPU each.
"""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "a2gen_rec.training.entrypoint",
        "a2gen_rec.runs.evaluate",
        "a2gen_rec.ensemble.fit",
        "a2gen_rec.cli.main",
        "tests.helpers.cards",
    ]
)


def on_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function(process, *args)`` on every rank and return the results in rank order.

    Args:
        world_size: Number of ranks.
        folder: Directory of the rendezvous file.
        function: Function to run; its first argument is the rank's :class:`DistributedContext`.
        args: Further arguments of the function.
    """
    store = folder / f"store-{os.urandom(4).hex()}"
    queue = _CONTEXT.Queue()
    workers = [
        _CONTEXT.Process(target=_worker, args=(rank, world_size, str(store), queue, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    try:
        results = dict(queue.get(timeout=120) for _ in workers)
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    for rank in range(world_size):
        assert results[rank][0] == "done", f"rank {rank}: {results[rank][1]}"
    return [results[rank][1] for rank in range(world_size)]


def _worker(rank: int, world_size: int, store: str, queue: Any, function: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    from a2gen_rec.utils.distributed import DistributedContext

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        queue.put(
            (rank, ("done", function(DistributedContext(rank, world_size, world_size, torch.device("cpu")), *args)))
        )
    except BaseException:
        queue.put((rank, ("failed", traceback.format_exc())))
    queue.close()
    queue.join_thread()
    os._exit(0)  # a failed rank must not wait for its group


def fork_launched_ranks(monkeypatch: pytest.MonkeyPatch, benchmark: ModuleType) -> None:
    """Let a benchmark fork the ranks that it launches instead of starting an interpreter for each."""
    launch_config = benchmark.LaunchConfig
    monkeypatch.setattr(
        benchmark, "LaunchConfig", lambda **settings: launch_config(**settings | {"start_method": "forkserver"})
    )


class CommandJob:
    """A running ``a2gen`` command on one or more ranks, with the ranks' environment variables of torchrun.

    Args:
        world_size: Number of ranks.
        output: File of the output of all ranks; must not exist.
        arguments: Arguments of the command.
    """

    def __init__(self, world_size: int, output: Path, arguments: Sequence[str]) -> None:
        self._output = output
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._ranks = []
        for rank in range(world_size):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            arguments_of_rank = (str(output), environment if world_size > 1 else {}, list(arguments))
            self._ranks.append(_CONTEXT.Process(target=_run_command, args=arguments_of_rank, daemon=True))
            self._ranks[-1].start()

    @property
    def is_running(self) -> bool:
        return all(rank.is_alive() for rank in self._ranks)

    def send_signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            os.kill(rank.pid, number)

    def wait(self, timeout_s: float = 120) -> tuple[list[int], str]:
        """Wait for all ranks, kill those that exceed the timeout, and return the exit codes and the output."""
        try:
            for rank in self._ranks:
                rank.join(timeout_s)
        finally:
            for rank in self._ranks:
                rank.kill()
        for rank in self._ranks:
            rank.join()
        return [rank.exitcode for rank in self._ranks], self._output.read_text() if self._output.exists() else ""


def _run_command(output: str, environment: dict[str, object], arguments: list[str]) -> None:
    import torch

    from a2gen_rec.cli.main import main

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    main(arguments)
