"""Run a function on several ranks of a gloo group, one process each."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["a2gen_rec.training.trainer", "tests.helpers.cards"])


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
