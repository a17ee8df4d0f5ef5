"""From dataset files to batches of user windows in an order determined by seed, epoch and loader state.

Row groups are permuted per epoch and assigned to ranks round-robin. Each rank reads a buffer of row groups at a time,
shuffles its windows and forms batches of similar length. No other state exists. A loader state of a few small numbers
therefore restores the stream exactly, independent of the number of prefetched batches.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import IterableDataset

from a2gen_rec.config import LoaderConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.window_reader import RowGroup, read_columns, read_row_groups
from a2gen_rec.errors import DataError

PREFETCH_BATCHES = 4
"""Number of batches in the prefetch queue."""


@dataclass(frozen=True)
class LoaderState:
    """Position of one rank in the data.

    Attributes:
        epoch: current epoch.
        world_size: number of ranks that share the data.
        groups_consumed: row groups of the epoch's order that all ranks had consumed before the last change of
            ``world_size``.
        buffer: index of this rank's next buffer.
        batch: index of the next batch in that buffer.
        groups: row groups consumed by this rank after ``groups_consumed``.
    """

    epoch: int = 0
    world_size: int = 1
    groups_consumed: int = 0
    buffer: int = 0
    batch: int = 0
    groups: int = 0

    @classmethod
    def reshard(cls, states: list["LoaderState"], world_size: int) -> list["LoaderState"]:
        """Return states for ``world_size`` ranks from the saved states of all ranks.

        The same number of ranks resumes exactly. A different number distributes the row groups that no rank has
        started. Buffers that some rank had started are read again in full, so that no window is skipped.
        """
        if len(states) == world_size:
            return states
        first = states[0]
        consumed = first.groups_consumed + min(state.groups for state in states) * first.world_size
        return [cls(epoch=first.epoch, world_size=world_size, groups_consumed=consumed)] * world_size


class WindowDataset(IterableDataset[WindowBatch]):
    """The batches of one rank, from ``state`` to the end of its epoch.

    Args:
        dataset: dataset to read.
        split: split to read.
        config: batch limits, buffer size and deduplication.
        full_tables: tables that every batch looks up completely, name -> rows.
        rank: rank of this process.
        world_size: number of ranks.
        seed: seed of the order.
        shuffle: permute row groups and windows; if False, every rank reads in file order.
        with_oracle: read the true probabilities.
        request_gap_s: as in :func:`collate`.
        file: single file of the split to read; all files if empty.
        replay: earlier dataset, of which every epoch reads some windows first; None for none.
        replay_share: number of these windows, as a share of those of ``dataset``.

    Raises:
        DataError: the split has no windows, or a file is not Parquet.
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
        replay: Dataset | None = None,
        replay_share: float = 0.0,
    ) -> None:
        self.card, self.config, self.full_tables = dataset.card, config, dict(full_tables)
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.with_oracle, self.request_gap_s = with_oracle, request_gap_s
        self.sources = [dataset] if replay is None else [dataset, replay]
        self.vectors = [source.open_vectors() for source in self.sources]
        self.groups = read_row_groups([file] if file else dataset.files(split))
        if not self.groups:
            raise DataError(f"split {split!r} has no windows", file=dataset.split_dir(split))
        self.num_new_groups = len(self.groups)
        if replay is not None:
            self.groups += sample_groups(read_row_groups(replay.files(split)), replay_share * self.num_windows, seed)
        self.state = LoaderState(world_size=world_size)

    def __iter__(self) -> Iterator[WindowBatch]:
        start = self.state
        groups_done = start.groups
        for buffer, source, groups in self._buffers(start):
            columns = read_columns(groups, self.card, self.with_oracle, self.sources[source].new_rows)
            batches = self._make_batches(columns.lengths, start.epoch, start.groups_consumed, buffer)
            skip = start.batch if buffer == start.buffer else 0
            for index in range(skip, len(batches)):
                batch = collate(
                    columns,
                    batches[index],
                    self.full_tables,
                    self.config.deduplicate_ids,
                    request_gap_s=self.request_gap_s,
                    bucket_overhead=self.config.bucket_overhead_tokens,
                    vectors=self.vectors[source],
                )
                is_last = index == len(batches) - 1
                batch.loader_state = asdict(
                    LoaderState(
                        epoch=start.epoch,
                        world_size=self.world_size,
                        groups_consumed=start.groups_consumed,
                        buffer=buffer + is_last,
                        batch=0 if is_last else index + 1,
                        groups=groups_done + (len(groups) if is_last else 0),
                    )
                )
                yield batch
            groups_done += len(groups)

    @cached_property
    def empty_batch(self) -> WindowBatch:
        """Batch without targets, used by a rank without data while other ranks still have data."""
        columns = read_columns(self.groups[:1], self.card, self.with_oracle, self.sources[0].new_rows)
        shortest = np.argsort(columns.lengths)[:1]
        dedup = self.config.deduplicate_ids
        return collate(columns, shortest, self.full_tables, dedup, include_targets=False, vectors=self.vectors[0])

    @property
    def num_windows(self) -> int:
        """Number of windows per epoch, over all ranks."""
        return sum(group.num_rows for group in self.groups)

    def windows_consumed(self, state: LoaderState) -> int:
        """Return the number of windows of the epoch in ``state.groups_consumed`` row groups."""
        return sum(self.groups[index].num_rows for index in self._group_order(state.epoch)[: state.groups_consumed])

    def _buffers(self, start: LoaderState) -> Iterator[tuple[int, int, list[RowGroup]]]:
        """Yield the index, the source and the row groups of this rank's buffers."""
        order = self._group_order(start.epoch)[start.groups_consumed :][self.rank :: self.world_size]
        windows = np.cumsum([self.groups[index].num_rows for index in order])
        is_new = order < self.num_new_groups
        # A buffer has one source. Replayed groups come first.
        buffer_of_group = 2 * ((windows - 1) // self.config.shuffle_buffer_size) + is_new if len(order) else windows
        for buffer, value in enumerate(np.unique(buffer_of_group)):
            if buffer >= start.buffer:
                of_buffer = buffer_of_group == value
                yield buffer, int(not is_new[of_buffer][0]), [self.groups[index] for index in order[of_buffer]]

    def _group_order(self, epoch: int) -> np.ndarray:
        """Return the order of the row groups: replayed ones, then those of the dataset."""
        order = np.arange(len(self.groups))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return order[np.argsort(order < self.num_new_groups, kind="stable")]

    def _make_batches(self, lengths: np.ndarray, epoch: int, groups_consumed: int, buffer: int) -> list[np.ndarray]:
        """Split a buffer's windows into batches of similar length within the configured limits."""
        rng = np.random.default_rng([self.seed, epoch, self.rank, groups_consumed, buffer])
        order = rng.permutation(len(lengths)) if self.shuffle else np.arange(len(lengths))
        order = order[np.argsort(lengths[order], kind="stable")]
        batches, start = [], 0
        while start < len(order):
            max_length = lengths[order[start : start + self.config.max_windows_per_batch]]
            padded = max_length * np.arange(1, len(max_length) + 1)
            size = max(1, int(np.searchsorted(padded, self.config.max_impressions_per_batch, side="right")))
            batches.append(order[start : start + size])
            start += size
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches


class WindowDataLoader:
    """Iterator over epochs of a :class:`WindowDataset`, optionally with a background thread that builds batches.

    A thread suffices: Arrow, numpy and torch release the interpreter lock. A process forked while communication
    threads run could inherit a lock that is never released.
    """

    def __init__(self, dataset: WindowDataset, prefetch: bool, pin_memory: bool = False) -> None:
        self.dataset, self.prefetch = dataset, prefetch
        self.pin_memory = pin_memory and torch.cuda.is_available()

    def iter_epoch(self, state: LoaderState) -> Generator[WindowBatch, None, None]:
        """Yield the rest of the epoch from ``state``.

        Raises:
            DataError: the data are invalid; also raised from the background thread.
        """
        self.dataset.state = state
        if not self.prefetch:
            yield from self._batches()
            return
        batches: queue.Queue[WindowBatch | BaseException | None] = queue.Queue(PREFETCH_BATCHES)
        is_closed = threading.Event()
        thread = threading.Thread(target=self._produce, args=(batches, is_closed), daemon=True)
        thread.start()
        try:
            while (batch := batches.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            is_closed.set()
            thread.join()

    def _batches(self) -> Iterator[WindowBatch]:
        for batch in self.dataset:
            yield batch.pin_memory() if self.pin_memory else batch

    def _produce(self, batches: "queue.Queue[WindowBatch | BaseException | None]", is_closed: threading.Event) -> None:
        def put(item: WindowBatch | BaseException | None) -> bool:
            while not is_closed.is_set():
                try:
                    batches.put(item, timeout=0.05)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            for batch in self._batches():
                if not put(batch):
                    return
            put(None)
        except BaseException as error:
            put(error)


def sample_groups(groups: Sequence[RowGroup], num_windows: float, seed: int) -> list[RowGroup]:
    """Return row groups in random order until they have ``num_windows``, rounded up to a row group.

    A row group has the windows of random users, as users are partitioned by hash.
    """
    order = np.random.default_rng([seed, len(groups)]).permutation(len(groups))
    windows = np.cumsum([groups[index].num_rows for index in order])
    count = int(np.searchsorted(windows, num_windows)) + 1 if num_windows > 0 else 0
    return [groups[index] for index in order[:count]]
