"""Session lists: the impressions of one user session, as the candidates of one request (METHODS §6).

Lists are jagged on disk and in memory, with consecutive candidates; only batches are padded. The Parquet files have
one row per list. Values of candidates and events are list columns with flattened vectors. The names of objectives and
behaviors and the widths of vectors are in the schema metadata.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor

from a2gen_rec.data.columns import concat_ranges
from a2gen_rec.errors import DataError, first_line
from a2gen_rec.utils import paths

FORMAT_VERSION = 2
"""Format of the files of session lists."""

_METADATA_KEY = b"a2gen_lists"
_ROW_GROUP_SIZE = 1024  # lists per row group; bounds the memory of copies
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
_SORTED_BATCHES = 32  # batches among which lists are sorted by length; few enough to keep a random order


@dataclass(frozen=True)
class SessionLists:
    """Jagged batch of n session lists.

    Attributes:
        objectives: Names of the K predictions.
        behaviors: Names of the M labels.
        user: [n] int64 user key.
        ts_ms: [n] int64 query time, the start of the list.
        length: [n] int64 number of candidates, at least 1.
        events_length: [n] int64 number of history events before the list.
        item: [candidates] int64 row of the item table.
        predictions: [candidates, K] float32, finite: logits of probabilities, log1p seconds of a watch time.
        label: [candidates, M] float32, 0, 1 or NaN if unknown.
        context: [candidates, d_context] float16 or float32.
        events: [all events, d_event] float16 or float32, oldest first.
    """

    objectives: tuple[str, ...]
    behaviors: tuple[str, ...]
    user: np.ndarray
    ts_ms: np.ndarray
    length: np.ndarray
    events_length: np.ndarray
    item: np.ndarray
    predictions: np.ndarray
    label: np.ndarray
    context: np.ndarray
    events: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    @property
    def widths(self) -> tuple[int, int]:
        """d_context, d_event."""
        return self.context.shape[1], self.events.shape[1]

    @property
    def mask(self) -> np.ndarray:
        """[n, max length] bool, False at padding of :meth:`pad`."""
        return _length_mask(self.length)

    def select(self, rows: np.ndarray) -> "SessionLists":
        """Return the lists of ``rows`` [any] int64, in that order."""
        candidates, events = self._flat(rows)
        return replace(
            self,
            user=self.user[rows],
            ts_ms=self.ts_ms[rows],
            length=self.length[rows],
            events_length=self.events_length[rows],
            item=self.item[candidates],
            predictions=self.predictions[candidates],
            label=self.label[candidates],
            context=self.context[candidates],
            events=self.events[events],
        )

    def pad(self, per_candidate: np.ndarray, fill: float = np.nan) -> np.ndarray:
        """Pad values [candidates, ...] to [n, max length, ...] with ``fill``."""
        return _pad(per_candidate, self.length, fill)

    def batch(self, rows: np.ndarray) -> "ListBatch":
        """Return the padded batch of the lists of ``rows``."""
        candidates, events = self._flat(rows)
        length, events_length = self.length[rows], self.events_length[rows]
        arrays = {
            "predictions": _pad(self.predictions[candidates], length),
            "label": _pad(self.label[candidates], length),
            "context": _pad(self.context[candidates].astype(np.float32, copy=False), length),
            "events": _pad(self.events[events].astype(np.float32, copy=False), events_length),
            "length": events_length,
            "mask": _length_mask(length),
            "candidate_index": candidates,
        }
        return ListBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def _flat(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return indices of the lists' candidates and of their events."""
        starts, events_starts = (np.cumsum(length) - length for length in (self.length, self.events_length))
        return concat_ranges(starts[rows], self.length[rows]), concat_ranges(
            events_starts[rows], self.events_length[rows]
        )


@dataclass(frozen=True)
class ListBatch:
    """Padded batch of n lists with up to C candidates and L events; zeros at padding.

    Attributes:
        predictions: [n, C, K] float32.
        label: [n, C, M] float32, NaN if unknown.
        context: [n, C, d_context] float32.
        events: [n, L, d_event] float32.
        length: [n] int64 number of events.
        mask: [n, C] bool, False at padding.
        candidate_index: [candidates] int64 index of each candidate in the lists of this batch's source.
    """

    predictions: Tensor
    label: Tensor
    context: Tensor
    events: Tensor
    length: Tensor
    mask: Tensor
    candidate_index: Tensor

    def to(self, device: torch.device) -> "ListBatch":
        return ListBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def concatenate(parts: Sequence[SessionLists]) -> SessionLists:
    """Concatenate one or more parts with the same names and widths."""
    first = parts[0]
    names = [field.name for field in fields(SessionLists) if field.name not in ("objectives", "behaviors")]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **arrays)


def batch_indices(lists: SessionLists, size: int, rng: np.random.Generator | None = None) -> Iterator[np.ndarray]:
    """Yield rows of batches of ``size`` lists of similar length, to reduce padding; the last batch may be smaller.

    Args:
        lists: Lists to batch.
        size: Lists per batch.
        rng: Shuffles lists and batches and sorts by length within groups of batches; None sorts all lists by length.
    """
    if rng is None:
        order = np.argsort(lists.length, kind="stable")
        yield from (order[first : first + size] for first in range(0, len(order), size))
        return
    order = rng.permutation(len(lists))
    batches = []
    for first in range(0, len(order), size * _SORTED_BATCHES):
        group = order[first : first + size * _SORTED_BATCHES]
        group = group[np.argsort(lists.length[group], kind="stable")]
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    yield from (batches[index] for index in rng.permutation(len(batches)))


def mean_std(lists: SessionLists) -> tuple[Tensor, Tensor]:
    """Return [K] float32 mean and standard deviation of the predictions; the deviation of a constant is 1."""
    predictions = lists.predictions.astype(np.float64)
    mean, std = predictions.mean(0), predictions.std(0)
    std = np.where(std > 1e-6, std, 1)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def write_lists(file: str, lists: SessionLists) -> None:
    """Write lists to one Parquet file as :func:`paths.atomic_writer`.

    Raises:
        DataError: The lists violate the contract of :class:`SessionLists`.
        UserError: The file cannot be written.
    """
    _check(lists, file)
    with paths.atomic_writer(file) as stream, pq.ParquetWriter(stream, _schema(lists), **_ENCODING) as writer:
        for first in range(0, len(lists), _ROW_GROUP_SIZE):
            writer.write_table(_table(lists.select(np.arange(first, min(first + _ROW_GROUP_SIZE, len(lists))))))


def read_lists(files: Sequence[str]) -> SessionLists:
    """Read all lists of the files, in order.

    Raises:
        DataError: There is no file, a file is corrupted or lacks a column, list columns of a row differ in length, a
            value is not finite, a label is not 0, 1 or NaN, or files differ in names or widths.
    """
    parts: list[SessionLists] = []
    for file in files:
        for part in _read(file):
            if parts and _header(part) != _header(parts[0]):
                raise DataError(f"objectives, behaviors or widths differ from {files[0]}", file=file)
            parts.append(part)
    if not parts:
        raise DataError("no session list file")
    return concatenate(parts)


_ENCODING: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["user_key"]}


def _header(lists: SessionLists) -> dict[str, Any]:
    d_context, d_event = lists.widths
    names = {"objectives": list(lists.objectives), "behaviors": list(lists.behaviors)}
    return {"format": FORMAT_VERSION, **names, "d_context": d_context, "d_event": d_event}


def _schema(lists: SessionLists) -> pa.Schema:
    columns = [("user_key", pa.int64()), ("ts_ms", pa.int64()), ("item", pa.list_(pa.int64()))]
    columns += [(f"prediction_{name}", pa.list_(pa.float32())) for name in lists.objectives]
    columns += [(f"label_{name}", pa.list_(pa.float32())) for name in lists.behaviors]
    columns += [(name, pa.list_(pa.from_numpy_dtype(getattr(lists, name).dtype))) for name in ("context", "events")]
    return pa.schema(columns, metadata={_METADATA_KEY: json.dumps(_header(lists)).encode()})


def _table(lists: SessionLists) -> pa.Table:
    def column(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
        flat = np.ascontiguousarray(values).reshape(-1)
        ends = np.cumsum(lengths * (values.shape[1] if values.ndim > 1 else 1))
        return pa.ListArray.from_arrays(pa.array(np.append(0, ends).astype(np.int32)), pa.array(flat))

    columns = [pa.array(lists.user), pa.array(lists.ts_ms), column(lists.item, lists.length)]
    columns += [column(values, lists.length) for values in (*lists.predictions.T, *lists.label.T)]
    columns += [column(lists.context, lists.length), column(lists.events, lists.events_length)]
    return pa.table(columns, schema=_schema(lists))


def _read(file: str) -> Iterator[SessionLists]:
    """Yield the checked row groups of a file; empty lists if it has none."""
    try:
        with g_pathmgr.open(file, "rb") as stream, pq.ParquetFile(stream) as parquet:
            schema = parquet.schema_arrow
            try:
                header = json.loads(schema.metadata[_METADATA_KEY])
                if header["format"] != FORMAT_VERSION:
                    raise DataError(
                        f"unsupported format version {header['format']}, expected {FORMAT_VERSION}", file=file
                    )
                names = ("objectives", "behaviors", "d_context", "d_event")
                objectives, behaviors, d_context, d_event = (header[name] for name in names)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError("not a session list file", file=file) from error
            expected = ["user_key", "ts_ms", "item", *(f"prediction_{name}" for name in objectives)]
            expected += [*(f"label_{name}" for name in behaviors), "context", "events"]
            for name in expected:
                if name not in schema.names:
                    raise DataError("column is missing", file=file, field=name)
            groups = range(parquet.num_row_groups)
            tables = (parquet.read_row_group(group, columns=expected, use_threads=False) for group in groups)
            for table in tables if groups else [schema.empty_table()]:
                row = _Rows(file, table.combine_chunks())
                item, length = row.jagged("item", (pa.int64(),))
                values = [row.candidate_values(f"prediction_{name}", length) for name in objectives]
                labels = [row.candidate_values(f"label_{name}", length) for name in behaviors]
                context, context_length = row.vectors("context", d_context)
                row.check_lengths(context_length, length, "context")
                events, events_length = row.vectors("events", d_event)
                lists = SessionLists(
                    tuple(objectives),
                    tuple(behaviors),
                    row.int64_values("user_key"),
                    row.int64_values("ts_ms"),
                    length,
                    events_length,
                    item,
                    np.stack(values, 1),
                    np.stack(labels, 1),
                    context,
                    events,
                )
                _check(lists, file)
                yield lists
    except (pa.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"cannot be read ({reason}); delete it to create it again", file=file) from error


@dataclass(frozen=True)
class _Rows:
    """Columns of a row group as arrays; errors name file and field."""

    file: str
    table: pa.Table

    def int64_values(self, name: str) -> np.ndarray:
        """Return a column as [rows] int64."""
        column = self._column(name)
        if column.type != pa.int64():
            raise DataError(f"type is {column.type}, expected int64", file=self.file, field=name)
        return column.to_numpy(zero_copy_only=False)

    def jagged(self, name: str, types: tuple[pa.DataType, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return values of a list column and [rows] their number per row."""
        column = self._column(name)
        if not pa.types.is_list(column.type) or column.type.value_type not in types:
            raise DataError(f"type is {column.type}, expected list of {types[0]}", file=self.file, field=name)
        values = column.flatten()
        if values.null_count:
            raise DataError("contains nulls", file=self.file, field=name)
        return values.to_numpy(zero_copy_only=False), np.diff(column.offsets.to_numpy()).astype(np.int64)

    def candidate_values(self, name: str, length: np.ndarray) -> np.ndarray:
        """Return values of a list column with one value per candidate."""
        values, lengths = self.jagged(name, (pa.float32(),))
        self.check_lengths(lengths, length, name)
        return values

    def vectors(self, name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return [vectors, width] float values and [rows] number of vectors per row."""
        values, lengths = self.jagged(name, (pa.float32(), pa.float16()))
        if (lengths % width).any():
            raise DataError(f"length is not a multiple of the vector width {width}", file=self.file, field=name)
        return values.reshape(-1, width), lengths // width

    def check_lengths(self, lengths: np.ndarray, expected: np.ndarray, name: str) -> None:
        """Check that a column has the list lengths of ``item``."""
        if (lengths != expected).any():
            raise DataError("list lengths differ from 'item'", file=self.file, field=name)

    def _column(self, name: str) -> pa.Array:
        column = self.table[name]
        if column.null_count:
            raise DataError("contains null rows", file=self.file, field=name)
        chunks = column.chunks
        return chunks[0] if chunks else pa.array([], column.type)


def _check(lists: SessionLists, file: str) -> None:
    """Check shapes and ranges of the contract."""
    n, candidates, events = len(lists), int(lists.length.sum()), int(lists.events_length.sum())
    shapes: dict[str, tuple[int, ...]] = {"user": (n,), "ts_ms": (n,), "events_length": (n,), "item": (candidates,)}
    shapes |= {"predictions": (candidates, len(lists.objectives)), "label": (candidates, len(lists.behaviors))}
    shapes |= {"context": (candidates, lists.context.shape[-1]), "events": (events, lists.events.shape[-1])}
    for name, shape in shapes.items():
        if getattr(lists, name).shape != shape:
            raise DataError(f"shape is {getattr(lists, name).shape}, expected {shape}", file=file, field=name)
    if not min(lists.widths):
        raise DataError("width of context and events must be at least 1", file=file)
    if (lists.length < 1).any():
        raise DataError("contains a list without candidates", file=file, field="item")
    for name in ("context", "events"):
        vectors = getattr(lists, name)
        if vectors.dtype not in _FLOATS:
            raise DataError(f"dtype is {vectors.dtype}, expected float16 or float32", file=file, field=name)
        if not np.isfinite(vectors).all():
            raise DataError("contains non-finite values", file=file, field=name)
    for name, values in zip(lists.objectives, lists.predictions.T, strict=True):
        if not np.isfinite(values).all():
            raise DataError("contains non-finite values", file=file, field=f"prediction_{name}")
    for name, labels in zip(lists.behaviors, lists.label.T, strict=True):
        if not ((labels == 0) | (labels == 1) | np.isnan(labels)).all():
            raise DataError("contains a label that is not 0, 1 or NaN", file=file, field=f"label_{name}")


def _length_mask(lengths: np.ndarray) -> np.ndarray:
    """Return [n, max length] bool, False at padding."""
    mask: np.ndarray = np.arange(lengths.max(initial=0)) < lengths[:, None]
    return mask


def _pad(values: np.ndarray, lengths: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """Pad jagged values [all, ...] to [n, max length, ...]."""
    mask = _length_mask(lengths)
    padded = np.full((*mask.shape, *values.shape[1:]), fill, values.dtype)
    padded[mask] = values
    return padded
