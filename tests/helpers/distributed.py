"""Run a function on several ranks of a gloo group, each in a process of its own."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["a2gen_rec.training.trainer", "tests.helpers.cards"])


def on_ranks(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(process, *args)`` on every rank; results in rank order. ``folder`` holds the rendezvous file."""
    store = folder / f"store-{os.urandom(4).hex()}"
    queue = _CONTEXT.Queue()
    workers = [
        _CONTEXT.Process(target=_worker, args=(rank, world, str(store), queue, function, args), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    try:
        results = dict(queue.get(timeout=120) for _ in workers)
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    for rank in range(world):
        assert results[rank][0] == "done", f"rank {rank}: {results[rank][1]}"
    return [results[rank][1] for rank in range(world)]


def _worker(rank: int, world: int, store: str, queue: Any, function: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    from a2gen_rec.utils.distributed import DistributedContext

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        queue.put((rank, ("done", function(DistributedContext(rank, world, world, torch.device("cpu")), *args))))
    except BaseException:
        queue.put((rank, ("failed", traceback.format_exc())))
    queue.close()
    queue.join_thread()
    os._exit(0)  # a failed rank must not wait for its group
