"""Raw log to dataset (``a2gen prepare``): staging, splits, feature encodings, windows.

Every phase streams or processes one user partition at a time. Memory is therefore bounded by
``PrepareConfig.memory_limit_gb`` and the largest partition, not by the log. The same input gives the same bytes.

With a base, the log continues an earlier dataset (``increment.py``). The definition of inputs and outcomes is that of
the base (``definition.py``); histories, counts and sums continue its carry (``carry.py``).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import duckdb
from rich.progress import Progress

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data import sources
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import ITEM_STATISTICS_FILE, ITEMS_FILE, USERS_FILE
from a2gen_rec.data.digests import identify_dataset
from a2gen_rec.data.features import feedback
from a2gen_rec.data.features.encodings import FeatureEncoding
from a2gen_rec.data.features.numbers import NumberEncoding
from a2gen_rec.data.features.sessions import SESSION_GAP_S, session_features
from a2gen_rec.data.inputs import Vector
from a2gen_rec.data.prepare import entities, splits, staging, statistics
from a2gen_rec.data.prepare.carry import CarryFiles, describe_source, write_history
from a2gen_rec.data.prepare.definition import Outcomes, Vocabularies, fit_feature, fit_numbers
from a2gen_rec.data.prepare.entities import EntityTable
from a2gen_rec.data.prepare.increment import Base, retire_before_ms, shared_settings
from a2gen_rec.data.prepare.point_in_time import CarriedSums, PointInTime, period_sql
from a2gen_rec.data.prepare.quality import measure_quality
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.prepare.window_files import WindowWriter
from a2gen_rec.data.prepare.windows import WindowSpec
from a2gen_rec.data.schema import EXIT, ITEM_ID, SPLITS, START, VOCABULARY_DIR
from a2gen_rec.data.sources.base import Source, SourceInfo, SplitRule
from a2gen_rec.data.sql import connect, fetch_one, read_parquet_sql, translate_errors
from a2gen_rec.data.vectors import EarlierVectors, open_vectors, write_vectors
from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.utils import paths
from a2gen_rec.utils.atomic_dir import atomic_output_dir, require_empty_dir

T = TypeVar("T")
LEVEL_FILES = {"item": ITEMS_FILE, "user": USERS_FILE}


def prepare(
    source_name: str,
    raw: str,
    out: str,
    config: PrepareConfig,
    spec: str | None = None,
    command: str = "",
    progress: bool = False,
    base: str = "",
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
        base: dataset to continue; empty for a new lineage.

    Raises:
        ConfigError: a setting or the spec is invalid.
        DataError: the log is invalid, with file, row, field and reason; or it does not continue the base.
        UserError: ``out`` is not empty or not writable, or the memory limit is exceeded.
    """
    require_empty_dir(out)
    earlier = Base.open(base) if base else None
    if earlier is not None:
        config = earlier.resolve_config(config)
    source = sources.open_source(source_name, paths.to_local_path(raw), spec)
    with translate_errors(raw):
        info = source.describe()
    columns = StagedColumns.from_source(info)
    if config.ttl_days and not info.has_elapsed_time:
        raise ConfigError(f"ttl_days {config.ttl_days}, but the times of {info.name} are not elapsed time")
    if earlier is not None:
        earlier.check_source(describe_source(info, columns.features), raw)
    rule = splits.resolve_split_rule(info, config, is_increment=earlier is not None)
    with atomic_output_dir(out) as output, Progress(disable=not progress) as progress_bar:
        connection = connect(config.memory_limit_gb, config.threads, output.parent / "spill")
        try:
            with translate_errors(raw):
                pipeline = PreparePipeline(
                    connection, source, info, columns, rule, config, output, output.parent, progress_bar, raw, earlier
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
        raw: path of the log, for messages.
        base: dataset to continue; None for none.
        retire_ms: time before which unseen values, users and items retire; None for never.
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
    raw: str = ""
    base: Base | None = None
    retire_ms: int | None = None

    def partition_file(self, number: int) -> Path:
        """Return the file of a partition's clean impressions."""
        return self.scratch_dir / "clean" / f"part-{number:05d}.parquet"

    @property
    def base_card(self) -> DatasetCard | None:
        return self.base.card if self.base is not None else None

    @property
    def carry(self) -> CarryFiles | None:
        """Files for the next increment; None if it is not to be possible."""
        return CarryFiles(self.output_dir) if self.config.carry else None

    def run(self, command: str) -> DatasetCard:
        """Write all files except the card and return the card."""
        info = self.info
        dropped = self.stage_log()
        boundaries = self.split_boundaries()
        split = self.split_columns(boundaries)
        all_impressions = f"(SELECT {split} FROM {read_parquet_sql(self.scratch_dir / 'clean', pattern='*.parquet')})"
        train = f"(SELECT * FROM {all_impressions} WHERE split = 0)"
        outcomes = (
            Outcomes.fit(self.connection, train, info)
            if self.base_card is None
            else Outcomes.of_base(info, self.base_card)
        )
        rule = outcomes.rule
        with_feedback = feedback.add_feedback_columns(all_impressions, rule)
        counts = statistics.count_splits(self.connection, with_feedback, info.actions, outcomes.flags)
        if not counts["train"].targets:
            raise DataError("no training impressions", file=info.name)
        splits.check_not_empty(self.split_rule, info, counts, boundaries)
        quality = measure_quality(self.connection, all_impressions, self.staged_columns.features, info.duration_feature)
        levels = feedback.count_levels(self.connection, with_feedback, rule)
        end_ms = max(each.last_ms for each in counts.values() if each.last_ms is not None)
        self.retire_ms = retire_before_ms(end_ms, self.config.ttl_days) if self.base is not None else None
        vocabularies = self.vocabularies(all_impressions)
        encodings = [
            fit_feature(self.connection, train, spec, vocabularies)
            for spec in self.track(self.staged_columns.features, "vocabularies")
            if spec.kind != "number"
        ]
        numbers = [
            fit_numbers(self.connection, train, spec, self.base)
            for spec in self.track(self.staged_columns.features, "numbers")
            if spec.kind == "number"
        ]
        train = f"(SELECT * FROM {with_feedback} WHERE split = 0)"
        point_in_time = self.point_in_time(with_feedback, train, outcomes, encodings)
        vectors = {vector.name: vector.relation(self.connection) for vector in info.vectors}
        self.write_items_and_users(with_feedback, train, encodings, numbers, outcomes, point_in_time, vectors)
        card_vectors = self.write_vectors(vectors)
        window_spec = WindowSpec(
            [
                *(encoding.feature for encoding in encodings),
                *(session_features(with_feedback=rule is not None) if info.has_elapsed_time else []),
                *(encoding.feature for encoding in feedback.feedback_encodings(rule)),
            ],
            self.staged_columns.actions,
            self.staged_columns.labels,
            outcomes.objectives,
            self.staged_columns.oracle,
            # One more than the history of a target, so that the gap before its oldest impression is known.
            self.config.max_history + 1 if self.config.max_history else 0,
            self.config.max_targets,
            numbers=[encoding.number for encoding in numbers],
            has_vectors=bool(vectors),
        )
        windows = self.write_windows(split, encodings, numbers, window_spec, outcomes, point_in_time)
        card = DatasetCard(
            name=info.name,
            actions=[START, *info.actions, EXIT],
            timed_actions=list(outcomes.median_time_s),
            labels=list(info.labels),
            objectives=outcomes.objectives,
            features=list(window_spec.features),
            feedback=rule,
            negative_actions=list(info.negative_actions),
            session_gap_s=SESSION_GAP_S,
            max_history=self.config.max_history,
            max_targets=self.config.max_targets,
            has_calendar_time=info.has_calendar_time,
            splits={name: counts[name].to_summary(windows[name], levels[name]) for name in SPLITS},
            base_rate=counts["train"].base_rates() if self.base_card is None else self.base_card.base_rate,
            median_time_s=outcomes.median_time_s,
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
            vocabularies=vocabularies.rows,
            ttl_days=self.config.ttl_days,
        )
        if self.carry is not None:
            self.carry.write_source(describe_source(info, self.staged_columns.features), shared_settings(self.config))
        lineage = self.base_card.identity.lineage if self.base_card is not None else []
        return replace(card, identity=identify_dataset(card, self.output_dir, lineage))

    def stage_log(self) -> dict[str, int]:
        """Write the raw log to clean partitions on disk; return the dropped rows by reason."""
        task = self.progress.add_task("reading the log", total=None)
        num_rows, dropped = staging.partition_by_user(
            self.connection,
            splits.time_range_sql(self.source.impressions(self.connection), self.info, self.config),
            self.staged_columns,
            self.info,
            self.config.num_partitions,
            self.scratch_dir / "raw",
        )
        self.progress.update(task, total=1, completed=1)
        # Only sources that number rows by file position need the insertion order.
        self.connection.execute("SET preserve_insertion_order = false")
        if num_rows == sum(dropped.values()):
            limits = (("start", "from"), ("end", "before"))
            part = "".join(f" {word} {value}" for name, word in limits if (value := getattr(self.config, name)))
            reason = f"no usable impression in {num_rows} rows{part} {dropped or ''}"
            raise DataError(reason.rstrip(), file=self.info.name)
        for number in self.track(range(self.config.num_partitions), "dropping duplicates"):
            partition = staging.deduplicate(
                self.connection,
                staging.partition_dir(self.scratch_dir / "raw", number),
                self.staged_columns,
                self.split_rule,
                self.partition_file(number),
                self.base.card.end_ms if self.base is not None else None,
                self.base.carry.history(number) if self.base is not None else None,
            )
            dropped |= {reason: dropped.get(reason, 0) + count for reason, count in partition.items() if count}
        if self.base is not None:
            kept = num_rows - sum(dropped.values())
            self.base.check_rows(kept, dropped, self.config.max_late_share, self.raw)
        return dropped

    def split_boundaries(self) -> splits.TimeBoundaries | None:
        """Return the boundaries of splits by time, None for other rules. All impressions must be staged."""
        if self.split_rule.method != "time":
            return None
        cleaned = read_parquet_sql(self.scratch_dir / "clean", pattern="*.parquet")
        return splits.time_boundaries(self.connection, cleaned, self.split_rule, self.info)

    def split_columns(self, boundaries: splits.TimeBoundaries | None) -> str:
        """Return the SQL of all columns of clean impressions, and of their split."""
        if self.split_rule.method == "train":
            return "*, 0::TINYINT AS split"
        return "*" if boundaries is None else f"*, {boundaries.split_sql()} AS split"

    def vocabularies(self, impressions: str) -> Vocabularies:
        """Return the writer of vocabularies."""
        names = [spec.name for spec in self.staged_columns.features if spec.kind == "vocabulary"]
        pending = {name: self.carry.pending(name) for name in names} if self.carry is not None else {}
        return Vocabularies(
            self.connection,
            impressions,
            self.staged_columns,
            self.config,
            self.output_dir / VOCABULARY_DIR,
            pending,
            self.base,
            self.retire_ms,
            {},
        )

    def point_in_time(
        self, impressions: str, train: str, outcomes: Outcomes, encodings: list[FeatureEncoding]
    ) -> PointInTime:
        """Compute the statistics of the values of all item features."""
        task = self.progress.add_task("statistics", total=None)
        features = [x for x in encodings if x.feature.level == "item"] if self.config.statistics else []
        names = [encoding.feature.name for encoding in features]
        retire_before = None
        if self.retire_ms is not None and self.info.has_calendar_time:
            (retire_before,) = fetch_one(
                self.connection, f"SELECT {self.period} FROM (SELECT {self.retire_ms} AS ts_ms)"
            )
        carried = CarriedSums(
            {name: self.base.carry.statistics(name) for name in names} if self.base is not None else {},
            {name: self.carry.statistics(name) for name in names} if self.carry is not None else {},
            retire_before,
        )
        point_in_time = PointInTime(
            self.connection,
            impressions,
            features,
            outcomes.summarized(self.connection, train, self.base_card) if features else [],
            self.period,
            self.info.has_calendar_time,
            self.scratch_dir / "statistics",
            carried,
        )
        self.progress.update(task, total=1, completed=1)
        return point_in_time

    @property
    def period(self) -> str:
        return period_sql(self.info.has_calendar_time, self.info.time_zone, self.base is not None)

    def write_items_and_users(
        self,
        impressions: str,
        train: str,
        encodings: list[FeatureEncoding],
        numbers: list[NumberEncoding],
        outcomes: Outcomes,
        point_in_time: PointInTime,
        vectors: Mapping[str, str],
    ) -> None:
        """Write items and users, and the counts of items: of training, or of all that precedes an increment."""
        with_vector = " UNION ".join(f"SELECT item_id FROM ({relation})" for relation in vectors.values())
        duration_feature = outcomes.rule.duration_feature if outcomes.rule is not None else ""
        for level, file in self.track(LEVEL_FILES.items(), "items and users"):
            is_item = level == "item"
            table = EntityTable.from_features(level, self.staged_columns.features, outcomes.actions, outcomes.flags)
            raw_file = (self.carry or CarryFiles(self.scratch_dir)).entities(level)
            earlier = self.base.carry.entities(level) if self.base is not None else None
            further = with_vector if is_item else ""
            table.write(self.connection, impressions, raw_file, earlier, further, self.retire_ms)
            table.write_encoded(
                self.connection,
                raw_file,
                encodings,
                numbers,
                self.output_dir / file,
                duration_feature,
                point_in_time if is_item else None,
            )
            if is_item:
                counts = (
                    entities.training_counts_sql(train, table.positives)
                    if earlier is None
                    else entities.earlier_counts_sql(earlier, table.positives)
                )
                item = next(encoding for encoding in encodings if encoding.feature.name == ITEM_ID)
                counts_file = self.output_dir / ITEM_STATISTICS_FILE
                entities.write_item_statistics(self.connection, counts, item, list(table.positives), counts_file)

    def write_vectors(self, vectors: Mapping[str, str]) -> list[Vector]:
        """Write the vectors of all items."""
        earlier = {}
        if self.base is not None:
            tables = open_vectors(str(self.base.folder), self.base.card.vectors)
            earlier = {x.name: EarlierVectors(self.base.items_file, tables[x.name], x) for x in self.base.card.vectors}
        return [
            write_vectors(
                self.connection,
                vectors[vector.name],
                vector.name,
                vector.width,
                self.output_dir / ITEMS_FILE,
                self.output_dir,
                earlier.get(vector.name),
            )
            for vector in self.track(self.info.vectors, "vectors")
        ]

    def write_windows(
        self,
        split: str,
        encodings: list[FeatureEncoding],
        numbers: list[NumberEncoding],
        window_spec: WindowSpec,
        outcomes: Outcomes,
        point_in_time: PointInTime,
    ) -> dict[str, int]:
        """Write the windows of every split, partition by partition; return the number of windows per split."""
        writer = WindowWriter(
            self.connection,
            self.staged_columns,
            split,
            encodings,
            numbers,
            window_spec,
            outcomes.rule,
            point_in_time,
            self.period,
            self.output_dir,
        )
        for number in self.track(range(self.config.num_partitions), "windows"):
            file = self.partition_file(number)
            history = self.base.carry.history(number) if self.base is not None else None
            if file.exists():
                writer.write(number, file, history)
            if self.carry is not None:
                limit = self.config.max_history + 2
                write_history(self.connection, file, history, self.carry.history(number), limit, self.retire_ms)
            file.unlink(missing_ok=True)
        return writer.num_windows

    def track(self, values: Iterable[T], phase: str) -> Iterator[T]:
        return iter(self.progress.track(list(values), description=phase))
