"""Reader of the row groups of user windows.

Decodes row groups into flat columns and checks them against the dataset card. Every violation of the format is reported
here with file, row and field, before a model reads the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from iopath.common.file_io import g_pathmgr

from a2gen_rec.data.bag_sql import WEIGHTS_COLUMN
from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.features.sessions import impression_end_ms
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.data.parquet_reader import NO_NEW_ROWS
from a2gen_rec.data.schema import ITEM_INDEX, STATISTICS_COLUMN, Feature, FeatureLevel
from a2gen_rec.errors import DataError, first_line


@dataclass(frozen=True)
class RowGroup:
    """A row group of a dataset file.

    Attributes:
        file: Parquet file.
        index: index of the row group in the file.
        first_row: row of its first window in the file.
        num_rows: number of windows.
    """

    file: str
    index: int
    first_row: int
    num_rows: int


def read_row_groups(files: Sequence[str]) -> list[RowGroup]:
    """Return all non-empty row groups of the files in order.

    Raises:
        DataError: a file is not a readable Parquet file.
    """
    groups = []
    for file in files:
        with _open_parquet(file) as parquet:
            first_row = 0
            for index in range(parquet.metadata.num_row_groups):
                num_rows = parquet.metadata.row_group(index).num_rows
                if num_rows:
                    groups.append(RowGroup(file, index, first_row, num_rows))
                first_row += num_rows
    return groups


def read_columns(
    groups: Sequence[RowGroup], card: DatasetCard, with_oracle: bool = False, new_rows: NewRows = NO_NEW_ROWS
) -> WindowColumns:
    """Read and check row groups.

    Args:
        groups: row groups.
        card: dataset card.
        with_oracle: read the true probabilities.
        new_rows: rows to replace by row 0.

    Raises:
        DataError: a file is truncated, a column is missing or has another type, an id, action code or time is out of
            range, or the lists of one window differ in length.
    """
    return WindowColumns.concat([_RowGroupReader(group, card, with_oracle, new_rows).read() for group in groups])


def read_user_windows(
    files: Sequence[str], card: DatasetCard, user: str, new_rows: NewRows = NO_NEW_ROWS
) -> WindowColumns | None:
    """Return all windows of one raw user identifier; None without windows. Reads only identifiers of other users.

    Raises:
        DataError: as in :func:`read_columns`.
    """
    for file in files:
        rows = _find_user_rows(user, file)
        if not len(rows):
            continue
        parts = []
        for group in read_row_groups([file]):
            group_rows = rows[(rows >= group.first_row) & (rows < group.first_row + group.num_rows)] - group.first_row
            if len(group_rows):
                parts.append(read_columns([group], card, new_rows=new_rows).take(group_rows))
        return WindowColumns.concat(parts)  # all windows of a user in a split are in one file
    return None


def _find_user_rows(user: str, file: str) -> np.ndarray:
    with _open_parquet(file) as parquet:
        try:
            users = parquet.read(columns=["user"], use_threads=False)["user"]
        except KeyError as error:
            raise DataError("column is missing", file=file, field="user") from error
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot be read ({first_line(error)})", file=file, field="user") from error
    if not pa.types.is_string(users.type):
        raise DataError(f"is {users.type}, expected string", file=file, field="user")
    return np.flatnonzero(pc.equal(users, user).fill_null(False).to_numpy())


def _open_parquet(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(g_pathmgr.open(file, "rb"))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file ({first_line(error)})", file=file) from error


class _RowGroupReader:
    """Reader of one row group, column by column."""

    def __init__(self, group: RowGroup, card: DatasetCard, with_oracle: bool, new_rows: NewRows) -> None:
        self.group, self.card, self.new_rows = group, card, new_rows
        self.labels = [f"label_{name}" for name in card.labels]
        self.objectives = [f"objective_{name}" for name in card.objectives]
        self.oracle = [f"oracle_{name}" for name in card.oracle_columns] if with_oracle else []
        names = ["user_key", "first_target", "ts_ms", "dwell_s", "action", "action_offset_s"]
        names += [each.name for each in card.inputs]
        names += [ITEM_INDEX] if card.vectors else []
        names += [WEIGHTS_COLUMN + feature.name for feature in card.features if feature.weighted]
        names += self.labels + self.objectives + self.oracle
        names += [STATISTICS_COLUMN] if card.statistics else []
        with _open_parquet(group.file) as parquet:
            for name in names:
                if name not in parquet.schema_arrow.names:
                    raise DataError("column is missing", file=group.file, field=name)
            try:
                self.table = parquet.read_row_group(group.index, columns=names, use_threads=False).combine_chunks()
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"cannot be read ({first_line(error)})", file=group.file) from error

    def read(self) -> WindowColumns:
        starts, lengths, ts_ms = self._list("ts_ms", pa.int64())
        self.window_index = np.repeat(np.arange(len(lengths)), lengths)
        same_window = self.window_index[1:] == self.window_index[:-1]
        ordered = np.append(True, ~same_window | (ts_ms[1:] >= ts_ms[:-1]))[: len(ts_ms)]
        self._check_impressions(ordered, "ts_ms", "must not decrease within the window")
        first_target = self._scalar("first_target")
        self._check((first_target >= 0) & (first_target <= lengths), "first_target", "is not in the window")
        action_starts, action_lengths, action = self._actions("action", pa.int64(), lengths)
        _, offset_lengths, offset_s = self._actions("action_offset_s", pa.float32(), lengths)
        self._check_actions(action_starts, action_lengths, action)
        self._check_impressions(action_lengths == offset_lengths, "action_offset_s", "differs in length from 'action'")
        self._check_offsets(action_starts, action_lengths, offset_s)
        dwell = self._impressions("dwell_s", pa.float32(), lengths)
        self._check_impressions(~((dwell < 0) | np.isinf(dwell)), "dwell_s", "time is negative or infinite")
        last_offset_s = np.fmax.reduceat(offset_s, action_starts) if len(dwell) else dwell
        rows: dict[FeatureLevel, dict[str, np.ndarray]] = {level: {} for level in get_args(FeatureLevel)}
        rows["context"] = rows["item"]  # both keep the card's order
        for feature in self.card.features:
            if feature.multi_valued:
                continue
            is_user_level = feature.level == "user"
            ids = self._scalar(feature.name) if is_user_level else self._impressions(feature.name, pa.int64(), lengths)
            ids = self.new_rows.mask(feature.name, ids)
            check = self._check if is_user_level else self._check_impressions
            check((ids >= 0) & (ids < feature.cardinality), feature.name, f"id is not in [0, {feature.cardinality})")
            rows[feature.level][feature.name] = ids
        num_targets = lengths - first_target
        return WindowColumns(
            user_key=self._scalar("user_key"),
            first_target=first_target,
            starts=starts,
            lengths=lengths,
            user_ids=rows["user"],
            impression_ids=rows["item"],
            session=rows["session"],
            outcome=rows["outcome"],
            ts_ms=ts_ms,
            end_ms=impression_end_ms(ts_ms, np.fmax(dwell, last_offset_s)),
            labels=self._matrix(self.labels, lengths),
            objectives=self._matrix(self.objectives, lengths),
            oracle=self._matrix(self.oracle, lengths),
            action_starts=action_starts,
            action_lengths=action_lengths,
            action=action,
            offset_s=offset_s,
            target_starts=np.cumsum(num_targets) - num_targets,
            statistics=self._statistics(num_targets),
            user_numbers=self._numbers(lengths, "user"),
            numbers=self._numbers(lengths, "item", "context"),
            item_index=self._item_index(lengths),
            user_bags={feature.name: self._bags(feature, lengths) for feature in self.card.bags_at("user")},
            impression_bags={
                feature.name: self._bags(feature, lengths) for feature in self.card.bags_at("item", "context")
            },
        )

    def _item_index(self, lengths: np.ndarray) -> np.ndarray:
        """Return [impressions] indices of the items' vectors; -1 for none."""
        if not self.card.vectors:
            return np.full(int(lengths.sum()), -1)
        index = self._impressions(ITEM_INDEX, pa.int64(), lengths)
        self._check_impressions(index >= -1, ITEM_INDEX, "is below -1")
        return index

    def _bags(self, feature: Feature, lengths: np.ndarray) -> Bags:
        """Return the bags of the windows (user level) or impressions."""
        is_user, name = feature.level == "user", feature.name
        check = self._check if is_user else self._check_impressions

        def read(name: str, dtype: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
            _, counts, values = self._list(name, dtype) if is_user else self._actions(name, dtype, lengths)
            return counts, values

        counts, ids = read(name, pa.int64())
        check(counts > 0, name, "list is empty")
        weights_name, weights = WEIGHTS_COLUMN + name, np.ones(len(ids), np.float32)
        if feature.weighted:
            weight_counts, weights = read(weights_name, pa.float32())
            check(weight_counts == counts, weights_name, f"differs in length from {name!r}")
        if len(ids):
            starts = np.cumsum(counts) - counts
            is_valid = np.minimum.reduceat((weights > 0) & np.isfinite(weights), starts)
            check(is_valid, weights_name, "weight is not positive")
        bags = self.new_rows.mask_bags(name, Bags(counts, ids, weights))
        if len(ids):
            starts = np.cumsum(bags.lengths) - bags.lengths
            lowest, highest = np.minimum.reduceat(bags.ids, starts), np.maximum.reduceat(bags.ids, starts)
            reason = f"id is not in [0, {feature.cardinality})"
            check((lowest >= 0) & (highest < feature.cardinality), name, reason)
        return bags

    def _numbers(self, lengths: np.ndarray, *levels: FeatureLevel) -> np.ndarray:
        """Return [windows, numbers] of the user level, or [impressions, numbers]."""
        is_user, columns = levels == ("user",), []
        for number in self.card.numbers_at(*levels):
            name, dtype = number.name, pa.float32()
            values = (
                self._values(self._column(name), name, dtype) if is_user else self._impressions(name, dtype, lengths)
            )
            (self._check if is_user else self._check_impressions)(~np.isinf(values), name, "value is infinite")
            columns.append(values)
        count = len(lengths) if is_user else int(lengths.sum())
        return np.stack(columns, axis=1) if columns else np.zeros((count, 0), np.float32)

    def _statistics(self, num_targets: np.ndarray) -> np.ndarray:
        """Return [targets, statistics]."""
        count = len(self.card.statistics)
        if not count:
            return np.zeros((int(num_targets.sum()), 0), np.float16)
        _, lengths, values = self._list(STATISTICS_COLUMN, pa.float16())
        self._check(lengths == count * num_targets, STATISTICS_COLUMN, f"must contain {count} values per target")
        is_valid = np.ones(len(lengths), bool)
        is_valid[np.repeat(np.arange(len(lengths)), lengths)[~np.isfinite(values)]] = False
        self._check(is_valid, STATISTICS_COLUMN, "value is not finite")
        return values.reshape(-1, count)

    def _check_actions(self, starts: np.ndarray, lengths: np.ndarray, action: np.ndarray) -> None:
        last = len(self.card.actions) - 1
        impression = np.repeat(np.arange(len(lengths)), lengths)
        is_valid = np.ones(len(lengths), bool)
        is_valid[impression[(action < 0) | (action > last)]] = False
        self._check_impressions(is_valid, "action", f"unknown action: code is not in [0, {last}]")
        reason = "must begin with 'start' and end with 'exit'"
        self._check_impressions(lengths >= 2, "action", reason)
        self._check_impressions((action[starts] == 0) & (action[starts + lengths - 1] == last), "action", reason)
        code = np.sort(impression * (last + 1) + action)
        is_valid = np.ones(len(lengths), bool)
        is_valid[code[1:][code[1:] == code[:-1]] // (last + 1)] = False
        self._check_impressions(is_valid, "action", "contains an action twice")

    def _check_offsets(self, starts: np.ndarray, lengths: np.ndarray, offset_s: np.ndarray) -> None:
        name = "action_offset_s"
        self._check_impressions(offset_s[starts] == 0, name, "'start' must be at 0 seconds")
        is_valid = np.ones(len(lengths), bool)
        is_valid[np.repeat(np.arange(len(lengths)), lengths)[(offset_s < 0) | np.isinf(offset_s)]] = False
        self._check_impressions(is_valid, name, "time is negative or infinite")

    def _column(self, name: str) -> pa.Array:
        column = self.table[name]
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise self._error("is null", name, row)
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def _values(self, array: pa.Array, name: str, dtype: pa.DataType, *lengths: np.ndarray) -> np.ndarray:
        """Return the values of a column as numpy array.

        Args:
            array: flat values.
            name: column name.
            dtype: expected type.
            lengths: lengths of the enclosing lists, innermost first.
        """
        if array.null_count:
            row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            for level in lengths:
                row = int(np.searchsorted(np.cumsum(level), row, side="right"))
            raise self._error("has a null value", name, row)
        try:
            return array.cast(dtype).to_numpy(zero_copy_only=False)
        except (pa.ArrowException, ValueError) as error:
            raise self._error(f"is {array.type}, expected {dtype} ({first_line(error)})", name, None) from error

    def _scalar(self, name: str) -> np.ndarray:
        return self._values(self._column(name), name, pa.int64())

    def _split(self, array: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            raise self._error(f"is {array.type}, expected a list", name, None)
        offsets = array.offsets.to_numpy().astype(np.int64)
        values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
        return offsets[:-1] - offsets[0], np.diff(offsets), values

    def _list(self, name: str, dtype: pa.DataType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        starts, lengths, values = self._split(self._column(name), name)
        return starts, lengths, self._values(values, name, dtype, lengths)

    def _impressions(self, name: str, dtype: pa.DataType, lengths: np.ndarray) -> np.ndarray:
        _, value_lengths, values = self._list(name, dtype)
        self._check(value_lengths == lengths, name, "differs in length from 'ts_ms'")
        return values

    def _actions(self, name: str, dtype: pa.DataType, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        _, outer_lengths, inner = self._split(self._column(name), name)
        self._check(outer_lengths == lengths, name, "differs in length from 'ts_ms'")
        starts, inner_lengths, values = self._split(inner, name)
        return starts, inner_lengths, self._values(values, name, dtype, inner_lengths, outer_lengths)

    def _matrix(self, names: list[str], lengths: np.ndarray) -> np.ndarray:
        columns = [self._impressions(name, pa.float32(), lengths) for name in names]
        return np.stack(columns, axis=1) if columns else np.zeros((int(lengths.sum()), 0), np.float32)

    def _check(self, is_valid: np.ndarray, name: str, reason: str) -> None:
        if not is_valid.all():
            raise self._error(reason, name, int(np.flatnonzero(~is_valid)[0]))

    def _check_impressions(self, is_valid: np.ndarray, name: str, reason: str) -> None:
        if not is_valid.all():
            raise self._error(reason, name, int(self.window_index[np.flatnonzero(~is_valid)[0]]))

    def _error(self, reason: str, name: str, row: int | None) -> DataError:
        file_row = None if row is None else self.group.first_row + row
        return DataError(reason, file=self.group.file, row=file_row, field=name)
