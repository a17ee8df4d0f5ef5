"""Process group, device and collectives of a process started by torchrun or alone."""

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
    """Rank, world size and device of this process."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes summaries."""
        return self.rank == 0


def select_device(choice: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device of this process.

    Raises:
        ConfigError: CUDA is requested but not available.
    """
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is 'cuda', but no GPU is available; run `a2gen doctor`")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(choice: Literal["auto", "cpu", "cuda"]) -> Iterator[DistributedContext]:
    """Join the job's process group: gloo for CPU tensors, NCCL for CUDA. Without torchrun, the group has one rank."""
    device = select_device(choice)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
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
        yield DistributedContext(dist.get_rank(), world_size, local_world_size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def sync_errors() -> Iterator[None]:
    """Raise a UserError of any rank on all ranks, so that no rank waits for a failed one.

    The block must not contain collectives, because a failed rank would not take part in them.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    raise_on_all_ranks(failure)


def raise_on_all_ranks(failure: UserError | None) -> None:
    """Raise the error of the lowest failed rank on all ranks; return if no rank failed."""
    for error in all_gather_object(failure):
        if error is not None:
            raise error


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a small host tensor over all ranks, in place, and return it."""
    dist.all_reduce(values)
    return values


def all_gather_object(value: object) -> list:
    """Return the values of all ranks, in rank order, on every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
