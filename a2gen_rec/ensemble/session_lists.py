"""Session lists: what a user was shown in one session, as the candidates of one request (METHODS §6).

Lists differ in length. On disk and in memory they are ragged, candidates one after another, and only batches are
padded. The Parquet files have one row per list; what belongs to candidates and events is a list column, vectors
flattened, their names and widths in the schema's metadata.
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor

from a2gen_rec.data.columns import concat_ranges
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.utils import paths

FORMAT_VERSION = 2
"""Format of the files of session lists."""

_METADATA_KEY = b"a2gen_lists"
_ROW_GROUP_SIZE = 1024  # lists of a row group: bounds what is held twice
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
_SORTED_BATCHES = 32  # batches that lists of like length are sought in: few enough to keep the order random


@dataclass(frozen=True)
class SessionLists:
    """n session lists, ragged.

    Attributes:
        objectives: names of the K values; behaviors: of the M labels.
        user: [n] int64 user key; ts_ms: [n] int64 begin of the list, the moment it was scored for.
        length: [n] int64 candidates of each list, 1 or more; events_length: [n] int64 events before it.
        item: [candidates] int64 row of the item's table.
        value: [candidates, K] float32, finite: logits of probabilities, log1p seconds of a watch time.
        label: [candidates, M] float32, 0, 1 or NaN where unknown.
        context: [candidates, d_context], events: [all events, d_event], oldest first; float16 or float32.
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
        """[n, longest] bool, False where ``pad`` fills up."""
        return _length_mask(self.length)

    def select(self, rows: np.ndarray) -> "SessionLists":
        """Some of the lists, [rows] int64, in that order."""
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
        """[candidates, ...] -> [n, longest, ...], filled up at the end."""
        return _pad(per_candidate, self.length, fill)

    def batch(self, rows: np.ndarray) -> "ListBatch":
        """Some of the lists padded, ready for a model."""
        candidates, events = self._flat(rows)
        inside, length = self.length[rows], self.events_length[rows]
        arrays = {
            "predictions": _pad(self.predictions[candidates], inside),
            "label": _pad(self.label[candidates], inside),
            "context": _pad(self.context[candidates].astype(np.float32, copy=False), inside),
            "events": _pad(self.events[events].astype(np.float32, copy=False), length),
            "length": length,
            "mask": _length_mask(inside),
            "candidate_index": candidates,
        }
        return ListBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def _flat(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the lists' candidates, and of their events."""
        starts, events_starts = (np.cumsum(length) - length for length in (self.length, self.events_length))
        return concat_ranges(starts[rows], self.length[rows]), concat_ranges(
            events_starts[rows], self.events_length[rows]
        )


@dataclass(frozen=True)
class ListBatch:
    """n lists of up to C candidates, L events before them; zeros at the end.

    Attributes:
        value: [n, C, K]; label: [n, C, M], NaN where unknown; context: [n, C, d_context]; all float32.
        events: [n, L, d_event] float32; length: [n] int64 number of events.
        valid: [n, C] bool, False at padding.
        candidate: [valid candidates] int64 their places in the lists this is a batch of.
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
    """One after another: parts (one or more) of the same names and widths."""
    first = parts[0]
    names = [field.name for field in fields(SessionLists) if field.name not in ("objectives", "behaviors")]
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(first, **arrays)


def batch_indices(lists: SessionLists, size: int, rng: np.random.Generator | None = None) -> Iterator[np.ndarray]:
    """Rows of batches of ``size`` lists, the last one smaller, of like lengths so that little is padding.

    Args:
        rng: shuffles lists and batches, and seeks like lengths among some batches' lists; None sorts by length.
    """
    if rng is None:
        order = np.argsort(lists.length, kind="stable")
        yield from (order[first : first + size] for first in range(0, len(order), size))
        return
    order = rng.permutation(len(lists))
    batches = []
    for first in range(0, len(order), size * _SORTED_BATCHES):
        some = order[first : first + size * _SORTED_BATCHES]
        some = some[np.argsort(lists.length[some], kind="stable")]
        batches += [some[begin : begin + size] for begin in range(0, len(some), size)]
    yield from (batches[place] for place in rng.permutation(len(batches)))


def mean_std(lists: SessionLists) -> tuple[Tensor, Tensor]:
    """[K] mean and standard deviation of each objective's values, 1 for one that never changes; float32."""
    value = lists.predictions.astype(np.float64)
    centre, spread = value.mean(0), value.std(0)
    scale = np.where(spread > 1e-6, spread, 1)
    return torch.from_numpy(centre).float(), torch.from_numpy(scale).float()


def write_lists(file: str, lists: SessionLists) -> None:
    """Write lists to one Parquet file; a local one is written beside and moved into place.

    Of several processes that write the same file at once, the last one's stays.

    Raises:
        DataError: they break the contract of :class:`Lists`.
        UserError: the place is not writable.
    """
    _check(lists, file)
    beside = f"{file}.{secrets.token_hex(4)}.writing" if paths.is_local(file) else file
    try:
        with g_pathmgr.open(beside, "wb") as stream, pq.ParquetWriter(stream, _schema(lists), **_ENCODING) as writer:
            for first in range(0, len(lists), _ROW_GROUP_SIZE):
                writer.write_table(_table(lists.select(np.arange(first, min(first + _ROW_GROUP_SIZE, len(lists))))))
        if beside != file:
            os.replace(beside, file)
    except OSError as error:
        if beside != file:
            with suppress(OSError):
                os.remove(beside)
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error


def read_lists(files: Sequence[str]) -> SessionLists:
    """All lists of the files, in order.

    Raises:
        DataError: there is no file, one is damaged or lacks a column, lists of one row differ in length, a value is
            not finite, a label not 0, 1 or NaN, or files differ in names or widths.
    """
    parts: list[SessionLists] = []
    for file in files:
        for part in _read(file):
            if parts and _header(part) != _header(parts[0]):
                raise DataError(f"has other objectives, behaviors or widths than {files[0]}", file=file)
            parts.append(part)
    if not parts:
        raise DataError("no file of session lists")
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
    """The row groups of a file, checked; lists without rows where it has none."""
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
                raise DataError("is no file of session lists", file=file) from error
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
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot be read ({reason}); remove it and it is made again", file=file) from error


@dataclass(frozen=True)
class _Rows:
    """A row group's columns as arrays, errors naming file and field."""

    file: str
    table: pa.Table

    def int64_values(self, name: str) -> np.ndarray:
        """[rows] int64"""
        column = self._column(name)
        if column.type != pa.int64():
            raise DataError(f"is {column.type}, not int64", file=self.file, field=name)
        return column.to_numpy(zero_copy_only=False)

    def jagged(self, name: str, types: tuple[pa.DataType, ...]) -> tuple[np.ndarray, np.ndarray]:
        """A list column's values, and [rows] how many each row has."""
        column = self._column(name)
        if not pa.types.is_list(column.type) or column.type.value_type not in types:
            raise DataError(f"is {column.type}, not a list of {types[0]}", file=self.file, field=name)
        values = column.flatten()
        if values.null_count:
            raise DataError("has empty values", file=self.file, field=name)
        return values.to_numpy(zero_copy_only=False), np.diff(column.offsets.to_numpy()).astype(np.int64)

    def candidate_values(self, name: str, length: np.ndarray) -> np.ndarray:
        values, own = self.jagged(name, (pa.float32(),))
        self.check_lengths(own, length, name)
        return values

    def vectors(self, name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        """[vectors, width] float, and [rows] how many each row has."""
        values, numbers = self.jagged(name, (pa.float32(), pa.float16()))
        if (numbers % width).any():
            raise DataError(f"is not made of vectors of width {width}", file=self.file, field=name)
        return values.reshape(-1, width), numbers // width

    def check_lengths(self, own: np.ndarray, length: np.ndarray, name: str) -> None:
        if (own != length).any():
            raise DataError("differs in length from 'item'", file=self.file, field=name)

    def _column(self, name: str) -> pa.Array:
        column = self.table[name]
        if column.null_count:
            raise DataError("has empty rows", file=self.file, field=name)
        chunks = column.chunks
        return chunks[0] if chunks else pa.array([], column.type)


def _check(lists: SessionLists, file: str) -> None:
    """Shapes and ranges of the contract."""
    n, candidates, events = len(lists), int(lists.length.sum()), int(lists.events_length.sum())
    shapes: dict[str, tuple[int, ...]] = {"user": (n,), "ts_ms": (n,), "events_length": (n,), "item": (candidates,)}
    shapes |= {"predictions": (candidates, len(lists.objectives)), "label": (candidates, len(lists.behaviors))}
    shapes |= {"context": (candidates, lists.context.shape[-1]), "events": (events, lists.events.shape[-1])}
    for name, shape in shapes.items():
        if getattr(lists, name).shape != shape:
            raise DataError(f"is of shape {getattr(lists, name).shape}, not {shape}", file=file, field=name)
    if not min(lists.widths):
        raise DataError("context and events must have a width of 1 or more", file=file)
    if (lists.length < 1).any():
        raise DataError("has a list without candidates", file=file, field="item")
    for name in ("context", "events"):
        vectors = getattr(lists, name)
        if vectors.dtype not in _FLOATS:
            raise DataError(f"is {vectors.dtype}, not float16 or float32", file=file, field=name)
        if not np.isfinite(vectors).all():
            raise DataError("has values that are not finite", file=file, field=name)
    for name, values in zip(lists.objectives, lists.predictions.T, strict=True):
        if not np.isfinite(values).all():
            raise DataError("has values that are not finite", file=file, field=f"prediction_{name}")
    for name, labels in zip(lists.behaviors, lists.label.T, strict=True):
        if not ((labels == 0) | (labels == 1) | np.isnan(labels)).all():
            raise DataError("has a label that is not 0, 1 or NaN", file=file, field=f"label_{name}")


def _length_mask(lengths: np.ndarray) -> np.ndarray:
    """[n, longest] bool, False at padding."""
    inside: np.ndarray = np.arange(lengths.max(initial=0)) < lengths[:, None]
    return inside


def _pad(values: np.ndarray, lengths: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """[all, ...], lists one after another -> [n, longest, ...], filled up at the end."""
    inside = _length_mask(lengths)
    padded = np.full((*inside.shape, *values.shape[1:]), fill, values.dtype)
    padded[inside] = values
    return padded
