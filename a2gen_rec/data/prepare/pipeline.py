"""Raw log to dataset (``a2gen prepare``): staging, splits, feature encodings, windows.

Every phase streams or processes one user partition at a time. Memory is therefore bounded by
``PrepareConfig.memory_limit_gb`` and the largest partition, not by the log. The same input gives the same bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data import sources
from a2gen_rec.data.dataset import (
    ITEM_STATISTICS_FILE,
    ITEMS_FILE,
    USERS_FILE,
    VOCABULARY_DIR,
)
from a2gen_rec.data.digests import identify_dataset
from a2gen_rec.data.features import encodings, feedback
from a2gen_rec.data.features.encodings import FeatureEncoding, encode_relation
from a2gen_rec.data.features.numbers import NumberEncoding, fit_number
from a2gen_rec.data.features.sessions import SESSION_GAP_S, add_session_columns, session_features
from a2gen_rec.data.prepare import splits, staging, statistics
from a2gen_rec.data.prepare.point_in_time import PERIOD, PointInTime, fit_outcomes, period_sql
from a2gen_rec.data.prepare.quality import measure_quality
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.prepare.windows import WindowSpec, build_windows
from a2gen_rec.data.schema import (
    EXIT,
    ITEM_ID,
    ITEM_INDEX,
    SPLITS,
    START,
    STATISTICS_COLUMN,
    DatasetCard,
    FeedbackRule,
)
from a2gen_rec.data.sources.base import Source, SourceInfo, SplitRule
from a2gen_rec.data.sql import ROW_COLUMN, connect, quote_identifier, quote_literal, read_parquet_sql, translate_errors
from a2gen_rec.data.vectors import write_vectors
from a2gen_rec.errors import DataError
from a2gen_rec.utils import paths
from a2gen_rec.utils.atomic_dir import atomic_output_dir, require_empty_dir

T = TypeVar("T")


def prepare(
    source_name: str,
    raw: str,
    out: str,
    config: PrepareConfig,
    spec: str | None = None,
    command: str = "",
    progress: bool = False,
) -> DatasetCard:
    """Write the dataset of a raw log to the new directory ``out`` and return its card.

    Args:
        source_name: one of ``sources.SOURCE_NAMES``.
        raw: file or directory of the log, local or remote.
        out: directory to create, local or remote; it appears only when complete.
        config: limits, splits and resources.
        spec: YAML file that describes the columns, for the source ``generic``.
        command: command line, stored in the card.
        progress: show a progress bar per phase.

    Raises:
        ConfigError: a setting or the spec is invalid.
        DataError: the log is invalid; with file, row, field and reason.
        UserError: ``out`` is not empty or not writable, or the memory limit is exceeded.
    """
    require_empty_dir(out)
    source = sources.open_source(source_name, paths.to_local_path(raw), spec)
    with translate_errors(raw):
        info = source.describe()
    columns = StagedColumns.from_source(info)
    rule = splits.resolve_split_rule(info, config)
    with atomic_output_dir(out) as output, Progress(disable=not progress) as progress_bar:
        connection = connect(config.memory_limit_gb, config.threads, output.parent / "spill")
        try:
            with translate_errors(raw):
                pipeline = PreparePipeline(
                    connection, source, info, columns, rule, config, output, output.parent, progress_bar
                )
                card = pipeline.run(command)
        finally:
            connection.close()
        card.save(str(output))
    return card


@dataclass
class PreparePipeline:
    """State shared by the phases of ``prepare``.

    Attributes:
        connection: DuckDB connection.
        source: raw log.
        info: metadata of the raw log.
        staged_columns: columns of staged impressions.
        split_rule: rule of the splits.
        config: limits, splits and resources.
        output_dir: directory of the dataset.
        scratch_dir: directory of temporary files.
        progress: progress bars.
    """

    connection: duckdb.DuckDBPyConnection
    source: Source
    info: SourceInfo
    staged_columns: StagedColumns
    split_rule: SplitRule
    config: PrepareConfig
    output_dir: Path
    scratch_dir: Path
    progress: Progress

    def partition_file(self, number: int) -> Path:
        """Return the file of a partition's clean impressions."""
        return self.scratch_dir / "clean" / f"part-{number:05d}.parquet"

    def run(self, command: str) -> DatasetCard:
        """Write all files except the card and return the card."""
        info = self.info
        dropped = self.stage_log()
        boundaries = self.split_boundaries()
        split = "*" if boundaries is None else f"*, {boundaries.split_sql()} AS split"
        all_impressions = f"(SELECT {split} FROM {read_parquet_sql(self.scratch_dir / 'clean', pattern='*.parquet')})"
        train = f"(SELECT * FROM {all_impressions} WHERE split = 0)"
        medians = statistics.median_times(self.connection, train, info.actions)
        rule = feedback.fit_feedback_rule(self.connection, train, info, medians.get(EXIT))
        objectives = feedback.derived_objectives(rule)
        flags = {name: quote_identifier(f"label_{name}") for name in info.labels}
        flags |= {name: quote_identifier(f"objective_{name}") for name in objectives}
        with_feedback = feedback.add_feedback_columns(all_impressions, rule)
        counts = statistics.count_splits(self.connection, with_feedback, info.actions, flags)
        if not counts["train"].targets:
            raise DataError("no training impressions", file=info.name)
        splits.check_not_empty(self.split_rule, info, counts, boundaries)
        quality = measure_quality(self.connection, all_impressions, self.staged_columns.features, info.duration_feature)
        levels = feedback.count_levels(self.connection, with_feedback, rule)
        encodings, numbers = self.fit_encodings(train), self.fit_numbers(train)
        train = f"(SELECT * FROM {with_feedback} WHERE split = 0)"
        point_in_time = self.point_in_time(with_feedback, train, flags, list(medians), encodings)
        vectors = {vector.name: vector.relation(self.connection) for vector in info.vectors}
        self.write_items_and_users(all_impressions, encodings, numbers, rule, point_in_time, vectors)
        card_vectors = [
            write_vectors(
                self.connection,
                vectors[vector.name],
                vector.name,
                vector.width,
                self.output_dir / ITEMS_FILE,
                self.output_dir,
            )
            for vector in self.track(info.vectors, "vectors")
        ]
        item_encoding = next(encoding for encoding in encodings if encoding.feature.name == ITEM_ID)
        file = self.output_dir / ITEM_STATISTICS_FILE
        statistics.write_item_statistics(self.connection, train, item_encoding, info.actions, flags, file)
        window_spec = WindowSpec(
            [
                *(encoding.feature for encoding in encodings),
                *(session_features(with_feedback=rule is not None) if info.has_elapsed_time else []),
                *(encoding.feature for encoding in feedback.feedback_encodings(rule)),
            ],
            self.staged_columns.actions,
            self.staged_columns.labels,
            objectives,
            self.staged_columns.oracle,
            # One more than the history of a target, so that the gap before its oldest impression is known.
            self.config.max_history + 1 if self.config.max_history else 0,
            self.config.max_targets,
            numbers=[encoding.number for encoding in numbers],
            has_vectors=bool(vectors),
        )
        windows = self.write_windows(split, encodings, numbers, window_spec, rule, point_in_time)
        card = DatasetCard(
            name=info.name,
            actions=[START, *info.actions, EXIT],
            timed_actions=list(medians),
            labels=list(info.labels),
            objectives=objectives,
            features=list(window_spec.features),
            feedback=rule,
            negative_actions=list(info.negative_actions),
            session_gap_s=SESSION_GAP_S,
            max_history=self.config.max_history,
            max_targets=self.config.max_targets,
            has_calendar_time=info.has_calendar_time,
            splits={name: counts[name].to_summary(windows[name], levels[name]) for name in SPLITS},
            base_rate=counts["train"].base_rates(),
            median_time_s=medians,
            oracle_columns=list(info.oracle),
            dropped_rows=dropped,
            source={
                "name": info.name,
                "licence": info.licence,
                "citation": info.citation,
                "url": info.url,
            },
            command=command,
            time_features=list(self.staged_columns.calendar_features),
            utc_offset_hours=info.time_zone.utc_offset_hours,
            time_zone=info.time_zone.name,
            quality=quality,
            statistics=point_in_time.statistics,
            numbers=list(window_spec.numbers),
            vectors=card_vectors,
        )
        return replace(card, identity=identify_dataset(card, self.output_dir))

    def stage_log(self) -> dict[str, int]:
        """Write the raw log to clean partitions on disk; return the dropped rows by reason."""
        task = self.progress.add_task("reading the log", total=None)
        num_rows, dropped = staging.partition_by_user(
            self.connection,
            self.source.impressions(self.connection),
            self.staged_columns,
            self.info,
            self.config.num_partitions,
            self.scratch_dir / "raw",
        )
        self.progress.update(task, total=1, completed=1)
        # Only sources that number rows by file position need the insertion order.
        self.connection.execute("SET preserve_insertion_order = false")
        if num_rows == sum(dropped.values()):
            raise DataError(f"no usable impression in {num_rows} rows {dropped or ''}".rstrip(), file=self.info.name)
        duplicates = 0
        for number in self.track(range(self.config.num_partitions), "dropping duplicates"):
            partition = staging.partition_dir(self.scratch_dir / "raw", number)
            duplicates += staging.deduplicate(
                self.connection, partition, self.staged_columns, self.split_rule, self.partition_file(number)
            )
        return {**dropped, "duplicate": duplicates} if duplicates else dropped

    def split_boundaries(self) -> splits.TimeBoundaries | None:
        """Return the boundaries of splits by time, None for other rules. All impressions must be staged."""
        if self.split_rule.method == "last":
            return None
        cleaned = read_parquet_sql(self.scratch_dir / "clean", pattern="*.parquet")
        return splits.time_boundaries(self.connection, cleaned, self.split_rule, self.info)

    def fit_encodings(self, train: str) -> list[FeatureEncoding]:
        """Fit every feature's encoding on training impressions and write the vocabularies."""
        return [
            encodings.fit_encoding(
                self.connection, train, spec, self.min_count(spec.name), self.output_dir / VOCABULARY_DIR
            )
            for spec in self.track(self.staged_columns.features, "vocabularies")
            if spec.kind != "number"
        ]

    def fit_numbers(self, train: str) -> list[NumberEncoding]:
        """Fit the standardization of every number on training impressions."""
        specs = [spec for spec in self.staged_columns.features if spec.kind == "number"]
        return [fit_number(self.connection, train, spec) for spec in self.track(specs, "numbers")]

    def min_count(self, feature: str) -> int:
        return 1 if feature in self.staged_columns.calendar_features else self.config.min_count

    def point_in_time(
        self,
        impressions: str,
        train: str,
        flags: Mapping[str, str],
        timed_actions: list[str],
        encodings: list[FeatureEncoding],
    ) -> PointInTime:
        """Compute the statistics of the values of all item features."""
        task = self.progress.add_task("statistics", total=None)
        features = [x for x in encodings if x.feature.level == "item"] if self.config.statistics else []
        statistics = PointInTime(
            self.connection,
            impressions,
            features,
            fit_outcomes(self.connection, train, self.info.actions, flags, timed_actions) if features else [],
            self.period,
            self.info.has_calendar_time,
            self.scratch_dir / "statistics",
        )
        self.progress.update(task, total=1, completed=1)
        return statistics

    @property
    def period(self) -> str:
        return period_sql(self.info.has_calendar_time, self.info.time_zone)

    def write_items_and_users(
        self,
        all_impressions: str,
        encodings: list[FeatureEncoding],
        numbers: list[NumberEncoding],
        rule: FeedbackRule | None,
        point_in_time: PointInTime,
        vectors: Mapping[str, str],
    ) -> None:
        with_vector = " UNION ".join(f"SELECT item_id FROM ({relation})" for relation in vectors.values())
        duration_feature = rule.duration_feature if rule is not None else ""
        for level, file in self.track((("item", ITEMS_FILE), ("user", USERS_FILE)), "items and users"):
            statistics.write_entities(
                self.connection,
                all_impressions,
                encodings,
                level,
                self.output_dir / file,
                duration_feature,
                point_in_time if level == "item" else None,
                numbers,
                with_vector if level == "item" else "",
            )

    def write_windows(
        self,
        split: str,
        encodings: list[FeatureEncoding],
        numbers: list[NumberEncoding],
        window_spec: WindowSpec,
        rule: FeedbackRule | None,
        point_in_time: PointInTime,
    ) -> dict[str, int]:
        """Write the windows of every split, partition by partition; return the number of windows per split."""
        columns = [
            "user_id",
            "user_key",
            "ts_ms",
            "dwell_s",
            "split",
            *self.staged_columns.action_columns,
            *self.staged_columns.label_columns,
        ]
        columns += [quote_identifier(f"objective_{name}") for name in window_spec.objectives]
        encodings = [*encodings, *feedback.feedback_encodings(rule)]
        session_feature_list = [feature for feature in window_spec.features if feature.level == "session"]
        num_windows = dict.fromkeys(SPLITS, 0)
        for name in SPLITS:
            (self.output_dir / name).mkdir()
        for number in self.track(range(self.config.num_partitions), "windows"):
            file = self.partition_file(number)
            if not file.exists():
                continue
            relation = feedback.add_feedback_columns(f"(SELECT {split} FROM {read_parquet_sql(file)})", rule)
            with_period = f'(SELECT *, {self.period} AS "{PERIOD}" FROM {relation})'
            selected = [f"raw.{column}" for column in columns]
            selected += point_in_time.positions
            joins = point_in_time.joins()
            if window_spec.has_vectors:
                items = f"read_parquet([{quote_literal(self.output_dir / ITEMS_FILE)}], file_row_number = true)"
                joins.append(f'LEFT JOIN {items} AS "items of vectors" ON raw.item_id = "items of vectors".item')
                selected.append(f'"items of vectors".file_row_number AS "{ROW_COLUMN}{ITEM_INDEX}"')
            rows = encode_relation(with_period, encodings, selected, ROW_COLUMN, joins, numbers)
            impressions = self.connection.sql(f"{rows} ORDER BY raw.user_id, raw.ts_ms, raw.item_id").to_arrow_table()
            impressions = point_in_time.append_values(impressions)
            impressions = add_session_columns(impressions, session_feature_list, SESSION_GAP_S)
            file.unlink()
            for code, name in enumerate(SPLITS):
                target = self.output_dir / name / f"part-{number:05d}.parquet"
                num_windows[name] += write_row_groups(build_windows(impressions, window_spec, code), target)
        return num_windows

    def track(self, values: Iterable[T], phase: str) -> Iterator[T]:
        return iter(self.progress.track(list(values), description=phase))


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
