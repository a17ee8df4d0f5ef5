"""This process among the ranks of a job, as torchrun started it, or alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.utils.malloc import retain_freed_memory


@dataclass(frozen=True)
class DistributedContext:
    """Rank and device of this process."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that talks and writes summaries."""
        return self.rank == 0


def select_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is 'cuda', but no GPU is available; `a2gen doctor` tells why")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(choice: Literal["auto", "cpu", "cuda"]) -> Iterator[DistributedContext]:
    """Join the job's process group: gloo for CPU tensors, NCCL for CUDA ones. Without torchrun: a group of one."""
    device = select_device(choice)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        retain_freed_memory()
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield DistributedContext(dist.get_rank(), world, local_world, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def sync_errors() -> Iterator[None]:
    """Raise on all ranks the user's error that any of them met inside, so that none is left waiting for another.

    Inside, ranks must not talk to each other: one that fails would no longer answer.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    raise_on_all_ranks(failure)


def raise_on_all_ranks(failure: UserError | None) -> None:
    """Raise the first rank's error on all ranks; nothing where none failed."""
    for error in all_gather_object(failure):
        if error is not None:
            raise error


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a small host tensor over all ranks."""
    dist.all_reduce(values)
    return values


def all_gather_object(value: object) -> list:
    """``value`` of every rank, in rank order, on every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
