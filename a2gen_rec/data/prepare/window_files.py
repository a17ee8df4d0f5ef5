"""Window files of a dataset: one file per split and user partition."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.dataset import ITEMS_FILE
from a2gen_rec.data.features import feedback
from a2gen_rec.data.features.encodings import FeatureEncoding, encode_relation
from a2gen_rec.data.features.numbers import NumberEncoding
from a2gen_rec.data.features.sessions import SESSION_COUNT, SESSION_GAP_S, add_session_columns
from a2gen_rec.data.prepare.carry import past_and_present_sql
from a2gen_rec.data.prepare.point_in_time import PERIOD, PointInTime
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.prepare.windows import WindowSpec, build_windows
from a2gen_rec.data.schema import ITEM_INDEX, SPLITS, STATISTICS_COLUMN, FeedbackRule
from a2gen_rec.data.sql import ROW_COLUMN, quote_identifier, quote_literal, read_parquet_sql


@dataclass
class WindowWriter:
    """Writer of the windows of all splits.

    Attributes:
        connection: DuckDB connection.
        columns: roles of the columns.
        split: SQL of all columns of clean impressions, and of their split.
        encodings: encodings of the log's features.
        numbers: encodings of numbers.
        spec: contents and limits of windows.
        rule: rule of feedback levels; None for none.
        point_in_time: statistics.
        period: SQL of the period of statistics.
        output_dir: directory of the dataset.
        num_windows: split -> number of windows written.
    """

    connection: duckdb.DuckDBPyConnection
    columns: StagedColumns
    split: str
    encodings: Sequence[FeatureEncoding]
    numbers: Sequence[NumberEncoding]
    spec: WindowSpec
    rule: FeedbackRule | None
    point_in_time: PointInTime
    period: str
    output_dir: Path
    num_windows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def __post_init__(self) -> None:
        for name in SPLITS:
            (self.output_dir / name).mkdir()

    def write(self, partition: int, clean: Path, history: Path | None) -> None:
        """Write the windows of a partition.

        Args:
            partition: number of the partition.
            clean: clean impressions of the log.
            history: latest impressions of the base's users; None or missing for none.
        """
        impressions = self._encoded_impressions(clean, history)
        for code, name in enumerate(SPLITS):
            target = self.output_dir / name / f"part-{partition:05d}.parquet"
            self.num_windows[name] += write_row_groups(build_windows(impressions, self.spec, code), target)

    def _encoded_impressions(self, clean: Path, history: Path | None) -> pa.Table:
        """Return impressions sorted by user, time and item, as :func:`build_windows` reads them."""
        present = f"SELECT {self.split} FROM {read_parquet_sql(clean)}"
        merged = past_and_present_sql(present, clean, history)
        relation = feedback.add_feedback_columns(merged, self.rule)
        with_period = f'(SELECT *, {self.period} AS "{PERIOD}" FROM {relation})'
        names = ["user_id", "user_key", "ts_ms", "dwell_s", "split"]
        names += [*self.columns.action_columns, *self.columns.label_columns]
        names += [quote_identifier(f"objective_{name}") for name in self.spec.objectives]
        if history is not None and history.exists():
            names.append(quote_identifier(SESSION_COUNT))
        selected = [*(f"raw.{name}" for name in names), *self.point_in_time.positions]
        joins = self.point_in_time.joins()
        if self.spec.has_vectors:
            items = f"read_parquet([{quote_literal(self.output_dir / ITEMS_FILE)}], file_row_number = true)"
            joins.append(f'LEFT JOIN {items} AS "items of vectors" ON raw.item_id = "items of vectors".item')
            # A retired item has no vector.
            selected.append(f'coalesce("items of vectors".file_row_number, -1) AS "{ROW_COLUMN}{ITEM_INDEX}"')
        encodings = [*self.encodings, *feedback.feedback_encodings(self.rule)]
        rows = encode_relation(with_period, encodings, selected, ROW_COLUMN, joins, self.numbers)
        impressions = self.connection.sql(f"{rows} ORDER BY raw.user_id, raw.ts_ms, raw.item_id").to_arrow_table()
        impressions = self.point_in_time.append_values(impressions)
        session = [feature for feature in self.spec.features if feature.level == "session"]
        return add_session_columns(impressions, session, SESSION_GAP_S)


def write_row_groups(tables: Iterator[pa.Table], file: Path) -> int:
    """Write tables as row groups of one file, or no file without tables; return the number of rows."""
    first = next(tables, None)
    if first is None:
        return 0
    rows = 0
    # Statistics repeat little: without a dictionary, they take half the size and a fifth of the time to read.
    dictionary = [_leaf(column) for column in first.schema if column.name != STATISTICS_COLUMN]
    with pq.ParquetWriter(file, first.schema, compression="zstd", use_dictionary=dictionary) as writer:
        for table in chain([first], tables):
            writer.write_table(table)
            rows += table.num_rows
    return rows


def _leaf(column: pa.Field) -> str:
    """Return the Parquet path of a column of values, lists, or lists of lists."""
    path, kind = column.name, column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        path, kind = f"{path}.list.element", kind.value_type
    return path
