"""Raw log to dataset (``a2gen prepare``): stage, split, learn the tables' rows, cut windows.

Every phase streams or works on one partition of the users at a time, so memory is bounded by
``PrepareConfig.memory_gb`` and the largest partition, not by the log. The same input gives the same bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data import sources
from a2gen_rec.data.dataset import ITEM_STATISTICS_FILE, ITEMS_FILE, USERS_FILE, VOCABULARY_DIR
from a2gen_rec.data.features import encodings, feedback
from a2gen_rec.data.features.encodings import FeatureEncoding, encode_relation
from a2gen_rec.data.features.sessions import SESSION_GAP_S, add_session_columns, session_features
from a2gen_rec.data.prepare import splits, staging, statistics
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.prepare.windows import WindowSpec, build_windows
from a2gen_rec.data.schema import EXIT, ITEM_ID, SPLITS, START, DatasetCard, FeedbackRule
from a2gen_rec.data.sources.base import Source, SourceInfo, SplitRule
from a2gen_rec.data.sql import ROW_COLUMN, connect, quote_identifier, read_parquet_sql, translate_errors
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
    """Write the dataset of a raw log to the new folder ``out`` and return its card.

    Args:
        source_name: one of ``sources.NAMES``.
        raw: the log's file or folder, local or remote.
        out: folder to create, local or remote; it appears only when complete.
        spec: YAML file describing the columns, for the ``generic`` source.
        command: what the user typed, kept in the card.
        progress: show a bar for each phase.

    Raises:
        ConfigError: a setting or the spec is impossible.
        DataError: the log breaks its format, naming file, row, field and reason.
        UserError: ``out`` is not empty or not writable, or memory ran out.
    """
    require_empty_dir(out)
    source = sources.open_source(source_name, paths.to_local_path(raw), spec)
    with translate_errors(raw):
        facts = source.describe()
    columns = StagedColumns.from_source(facts)
    rule = splits.resolve_split_rule(facts, config)
    with atomic_output_dir(out) as output, Progress(disable=not progress) as bars:
        connection = connect(config.memory_limit_gb, config.threads, output.parent / "spill")
        try:
            with translate_errors(raw):
                job = PreparePipeline(connection, source, facts, columns, rule, config, output, output.parent, bars)
                card = job.run(command)
        finally:
            connection.close()
        card.save(str(output))
    return card


@dataclass
class PreparePipeline:
    """One run of ``prepare``: what its phases share."""

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
        return self.scratch_dir / "clean" / f"part-{number:05d}.parquet"

    def run(self, command: str) -> DatasetCard:
        facts = self.info
        dropped = self.stage_log()
        split = self.split_column()
        everything = f"(SELECT {split} FROM {read_parquet_sql(self.scratch_dir / 'clean' / '*.parquet')})"
        train = f"(SELECT * FROM {everything} WHERE split = 0)"
        medians = statistics.median_times(self.connection, train, facts.actions)
        rule = feedback.fit_feedback_rule(self.connection, train, facts, medians.get(EXIT))
        objectives = feedback.derived_objectives(rule)
        flags = {name: quote_identifier(f"label_{name}") for name in facts.labels}
        flags |= {name: quote_identifier(f"objective_{name}") for name in objectives}
        levelled = feedback.add_feedback_columns(everything, rule)
        counts = statistics.count_splits(self.connection, levelled, facts.actions, flags)
        if not counts["train"].targets:
            raise DataError("no impression is left to train on", file=facts.name)
        levels = feedback.count_levels(self.connection, levelled, rule)
        encodings = self.fit_encodings(train)
        self.write_items_and_users(everything, encodings, rule)
        item = next(coding for coding in encodings if coding.feature.name == ITEM_ID)
        train = f"(SELECT * FROM {levelled} WHERE split = 0)"
        file = self.output_dir / ITEM_STATISTICS_FILE
        statistics.write_item_statistics(self.connection, train, item, facts.actions, flags, file)
        layout = WindowSpec(
            [
                *(coding.feature for coding in encodings),
                *(session_features(with_feedback=rule is not None) if facts.has_elapsed_time else []),
                *(coding.feature for coding in feedback.feedback_encodings(rule)),
            ],
            self.staged_columns.actions,
            self.staged_columns.labels,
            objectives,
            self.staged_columns.oracle,
            # One more than any target sees: the oldest one's gap to the impression before it is known too.
            self.config.max_history + 1 if self.config.max_history else 0,
            self.config.max_targets,
        )
        windows = self.write_windows(split, encodings, layout, rule)
        return DatasetCard(
            name=facts.name,
            actions=[START, *facts.actions, EXIT],
            timed_actions=list(medians),
            labels=list(facts.labels),
            objectives=objectives,
            features=list(layout.features),
            feedback=rule,
            negative_actions=list(facts.negative_actions),
            session_gap_s=SESSION_GAP_S,
            max_history=self.config.max_history,
            max_targets=self.config.max_targets,
            has_calendar_time=facts.has_calendar_time,
            splits={name: counts[name].to_summary(windows[name], levels[name]) for name in SPLITS},
            base_rate=counts["train"].base_rates(),
            median_time_s=medians,
            oracle_columns=list(facts.oracle),
            dropped_rows=dropped,
            source={
                "name": facts.name,
                "licence": facts.licence,
                "citation": facts.citation,
                "url": facts.url,
            },
            command=command,
            time_features=list(self.staged_columns.calendar_features),
            utc_offset_hours=facts.utc_offset_hours,
        )

    def stage_log(self) -> dict[str, int]:
        """Raw log to clean partitions on disk; returns the rows dropped, by reason."""
        reading = self.progress.add_task("reading the log", total=None)
        read, dropped = staging.partition_by_user(
            self.connection,
            self.source.impressions(self.connection),
            self.staged_columns,
            self.info.utc_offset_hours,
            self.config.num_partitions,
            self.scratch_dir / "raw",
        )
        self.progress.update(reading, total=1, completed=1)
        # A source whose rows are numbered by their place in the file needs that order; nothing below does.
        self.connection.execute("SET preserve_insertion_order = false")
        if read == sum(dropped.values()):
            raise DataError(f"no usable impression in {read} rows {dropped or ''}".rstrip(), file=self.info.name)
        duplicates = 0
        for number in self.track(range(self.config.num_partitions), "dropping duplicates"):
            partition = self.scratch_dir / "raw" / f"partition={number}"
            duplicates += staging.deduplicate(
                self.connection, partition, self.staged_columns, self.split_rule, self.partition_file(number)
            )
        return {**dropped, "duplicate": duplicates} if duplicates else dropped

    def split_column(self) -> str:
        """SELECT list of clean impressions with their split; a rule by time needs all of them to be staged."""
        if self.split_rule.method == "last":
            return "*"
        cleaned = read_parquet_sql(self.scratch_dir / "clean" / "*.parquet")
        boundaries = splits.time_boundaries(self.connection, cleaned, self.split_rule, self.info.utc_offset_hours)
        return f"*, {boundaries.split_sql()} AS split"

    def fit_encodings(self, train: str) -> list[FeatureEncoding]:
        """Every feature's rows, from training impressions; writes the vocabularies."""
        return [
            encodings.fit_encoding(
                self.connection, train, spec, self.min_count(spec.name), self.output_dir / VOCABULARY_DIR
            )
            for spec in self.track(self.staged_columns.features, "vocabularies")
        ]

    def min_count(self, feature: str) -> int:
        return 1 if feature in self.staged_columns.calendar_features else self.config.min_count

    def write_items_and_users(
        self, everything: str, encodings: list[FeatureEncoding], rule: FeedbackRule | None
    ) -> None:
        duration_feature = rule.duration_feature if rule is not None else ""
        for level, file in self.track((("item", ITEMS_FILE), ("user", USERS_FILE)), "items and users"):
            statistics.write_entities(
                self.connection, everything, encodings, level, self.output_dir / file, duration_feature
            )

    def write_windows(
        self, split: str, encodings: list[FeatureEncoding], layout: WindowSpec, rule: FeedbackRule | None
    ) -> dict[str, int]:
        """Partition by partition, the windows of every split; returns the windows written per split."""
        columns = [
            "user_id",
            "user_key",
            "ts_ms",
            "dwell_s",
            "split",
            *self.staged_columns.action_columns,
            *self.staged_columns.label_columns,
        ]
        columns += [quote_identifier(f"objective_{name}") for name in layout.objectives]
        encodings = [*encodings, *feedback.feedback_encodings(rule)]
        session = [feature for feature in layout.features if feature.level == "session"]
        written = dict.fromkeys(SPLITS, 0)
        for name in SPLITS:
            (self.output_dir / name).mkdir()
        for number in self.track(range(self.config.num_partitions), "windows"):
            file = self.partition_file(number)
            if not file.exists():
                continue
            relation = feedback.add_feedback_columns(f"(SELECT {split} FROM {read_parquet_sql(file)})", rule)
            rows = encode_relation(relation, encodings, [f"raw.{column}" for column in columns], ROW_COLUMN)
            impressions = self.connection.sql(f"{rows} ORDER BY raw.user_id, raw.ts_ms, raw.item_id").to_arrow_table()
            impressions = add_session_columns(impressions, session, SESSION_GAP_S)
            file.unlink()
            for code, name in enumerate(SPLITS):
                target = self.output_dir / name / f"part-{number:05d}.parquet"
                written[name] += write_row_groups(build_windows(impressions, layout, code), target)
        return written

    def track(self, values: Iterable[T], phase: str) -> Iterator[T]:
        return iter(self.progress.track(list(values), description=phase))


def write_row_groups(tables: Iterator[pa.Table], file: Path) -> int:
    """Write tables as the row groups of one file, none where there is no table; returns the row count."""
    first = next(tables, None)
    if first is None:
        return 0
    rows = 0
    with pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for table in chain([first], tables):
            writer.write_table(table)
            rows += table.num_rows
    return rows
