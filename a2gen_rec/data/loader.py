"""From dataset files to batches of user windows, in an order that is a pure function of seed, epoch and position.

Row groups are permuted per epoch and dealt out to the ranks; each rank reads a buffer of them at a time, shuffles
its windows and cuts them into batches of similar length. Because nothing else enters, a position of three small
numbers restores the stream exactly, however many batches a background process had made in advance.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import IterableDataset

from a2gen_rec.config import LoaderConfig
from a2gen_rec.data.batch import WindowBatch, collate
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.parquet_reader import RowGroup, read_columns, read_row_groups
from a2gen_rec.errors import DataError

PREFETCH_BATCHES = 4
"""Batches made in advance."""


@dataclass(frozen=True)
class LoaderState:
    """Where one rank stands in the data.

    Attributes:
        epoch: pass over the data.
        world: ranks that share it.
        dealt: row groups of the epoch's order that were finished by all ranks before ``world`` took over.
        buffer, batch: next batch of next buffer of this rank.
        groups: row groups this rank has finished since ``dealt``.
    """

    epoch: int = 0
    world_size: int = 1
    groups_consumed: int = 0
    buffer: int = 0
    batch: int = 0
    groups: int = 0

    @classmethod
    def reshard(cls, states: list["LoaderState"], world_size: int) -> list["LoaderState"]:
        """Positions for ``world`` ranks from those saved by all former ranks.

        The same number of ranks goes on exactly. Another number deals out what no rank has begun; buffers that
        some rank had begun are read again whole, so that nothing is left out.
        """
        if len(states) == world_size:
            return states
        first = states[0]
        consumed = first.groups_consumed + min(rank.groups for rank in states) * first.world_size
        return [cls(epoch=first.epoch, world_size=world_size, groups_consumed=consumed)] * world_size


class WindowDataset(IterableDataset[WindowBatch]):
    """The batches of one rank, from ``position`` to the end of its epoch.

    Args:
        whole: tables looked up whole by every batch, name -> rows.
        shuffle: permute row groups and windows; off, every rank reads in file order.
        request_gap_s: as :func:`collate` takes.
        file: the only one of the split to read; all by default.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        config: LoaderConfig,
        full_tables: Mapping[str, int],
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        with_oracle: bool = False,
        request_gap_s: float | None = None,
        file: str = "",
    ) -> None:
        self.card, self.config, self.full_tables = dataset.card, config, dict(full_tables)
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.with_oracle, self.request_gap_s = with_oracle, request_gap_s
        self.groups = read_row_groups([file] if file else dataset.files(split))
        if not self.groups:
            raise DataError(f"split {split!r} has no windows", file=dataset.split_dir(split))
        self.state = LoaderState(world_size=world_size)

    def __iter__(self) -> Iterator[WindowBatch]:
        start = self.state
        done = start.groups
        for number, groups in self._buffers(start):
            columns = read_columns(groups, self.card, self.with_oracle)
            batches = self._make_batches(columns.lengths, start.epoch, start.groups_consumed, number)
            skip = start.batch if number == start.buffer else 0
            for index in range(skip, len(batches)):
                batch = collate(
                    columns,
                    batches[index],
                    self.full_tables,
                    self.config.deduplicate_ids,
                    request_gap_s=self.request_gap_s,
                    bucket_overhead=self.config.bucket_overhead_tokens,
                )
                last = index == len(batches) - 1
                batch.loader_state = asdict(
                    LoaderState(
                        epoch=start.epoch,
                        world_size=self.world_size,
                        groups_consumed=start.groups_consumed,
                        buffer=number + last,
                        batch=0 if last else index + 1,
                        groups=done + (len(groups) if last else 0),
                    )
                )
                yield batch
            done += len(groups)

    @cached_property
    def empty_batch(self) -> WindowBatch:
        """A batch without targets: what a rank contributes when others still have data."""
        columns = read_columns(self.groups[:1], self.card, self.with_oracle)
        shortest = np.argsort(columns.lengths)[:1]
        return collate(columns, shortest, self.full_tables, self.config.deduplicate_ids, include_targets=False)

    @property
    def num_windows(self) -> int:
        """Windows of one epoch, over all ranks."""
        return sum(group.num_rows for group in self.groups)

    def windows_consumed(self, state: LoaderState) -> int:
        """Windows of ``position``'s epoch that had been dealt out before the present ranks took over."""
        return sum(self.groups[place].num_rows for place in self._group_order(state.epoch)[: state.groups_consumed])

    def _buffers(self, start: LoaderState) -> Iterator[tuple[int, list[RowGroup]]]:
        mine = [
            self.groups[place]
            for place in self._group_order(start.epoch)[start.groups_consumed :][self.rank :: self.world_size]
        ]
        windows = np.cumsum([group.num_rows for group in mine])
        buffer = (windows - 1) // self.config.shuffle_buffer_size if len(mine) else windows
        for number, value in enumerate(np.unique(buffer)):
            if number >= start.buffer:
                yield number, [group for group, own in zip(mine, buffer, strict=True) if own == value]

    def _group_order(self, epoch: int) -> np.ndarray:
        order = np.arange(len(self.groups))
        return np.random.default_rng([self.seed, epoch]).permutation(order) if self.shuffle else order

    def _make_batches(self, lengths: np.ndarray, epoch: int, groups_consumed: int, buffer: int) -> list[np.ndarray]:
        """Cut a buffer's windows into batches of similar length, within the bounds."""
        rng = np.random.default_rng([self.seed, epoch, self.rank, groups_consumed, buffer])
        order = rng.permutation(len(lengths)) if self.shuffle else np.arange(len(lengths))
        order = order[np.argsort(lengths[order], kind="stable")]
        batches, begin = [], 0
        while begin < len(order):
            longest = lengths[order[begin : begin + self.config.max_windows_per_batch]]
            padded = longest * np.arange(1, len(longest) + 1)
            size = max(1, int(np.searchsorted(padded, self.config.max_impressions_per_batch, side="right")))
            batches.append(order[begin : begin + size])
            begin += size
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches


class WindowDataLoader:
    """Epoch after epoch of a :class:`WindowStream`, batches made by a thread of their own if so configured.

    A thread, not a process: the work is in Arrow, numpy and torch, which let other threads run, and a process forked
    beside running communication threads can inherit a lock that none will ever release.
    """

    def __init__(self, dataset: WindowDataset, prefetch: bool, pin_memory: bool = False) -> None:
        self.dataset, self.prefetch = dataset, prefetch
        self.pin_memory = pin_memory and torch.cuda.is_available()

    def iter_epoch(self, state: LoaderState) -> Generator[WindowBatch, None, None]:
        """The rest of the epoch from ``position``.

        Raises:
            DataError: the data break their contract, wherever the batch was made.
        """
        self.dataset.state = state
        if not self.prefetch:
            yield from self._batches()
            return
        made: queue.Queue[WindowBatch | BaseException | None] = queue.Queue(PREFETCH_BATCHES)
        left = threading.Event()
        thread = threading.Thread(target=self._produce, args=(made, left), daemon=True)
        thread.start()
        try:
            while (batch := made.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            left.set()
            thread.join()

    def _batches(self) -> Iterator[WindowBatch]:
        for batch in self.dataset:
            yield batch.pin_memory() if self.pin_memory else batch

    def _produce(self, made: "queue.Queue[WindowBatch | BaseException | None]", left: threading.Event) -> None:
        def hand_over(item: WindowBatch | BaseException | None) -> bool:
            while not left.is_set():
                try:
                    made.put(item, timeout=0.05)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            for batch in self._batches():
                if not hand_over(batch):
                    return
            hand_over(None)
        except BaseException as error:
            hand_over(error)
