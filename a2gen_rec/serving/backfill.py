"""A log's latest impressions into a service's store (``a2gen backfill``): the past of users who come to it.

The log is read by its source and cleaned as ``prepare`` does, so that histories are those that the model was trained
on. An impression that is recorded already is replaced: what was stopped is done again, and a live store may be filled.
"""

import math
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import duckdb
from rich.progress import track

from a2gen_rec.artifact.model_dir import resolve_model_dir
from a2gen_rec.artifact.manifest import read_manifest
from a2gen_rec.config import PrepareConfig
from a2gen_rec.data import sources
from a2gen_rec.data.features.calendar import features_from_time
from a2gen_rec.data.prepare import staging
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.schema import ITEM_ID, DatasetCard
from a2gen_rec.data.sources.base import Source, SourceInfo, SplitRule
from a2gen_rec.data.sql import connect, quote_identifier, read_parquet_sql, translate_errors
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.engine.history_cache import SESSION_MARGIN
from a2gen_rec.serving.stores.base import EventStore, StoreError
from a2gen_rec.serving.stores.factory import open_store
from a2gen_rec.utils import paths

MAX_IN_FLIGHT = 1024
"""Users whose impressions may wait to be recorded: stores write many together."""
FETCH_ROWS = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class BackfillResult:
    """What was recorded."""

    users: int
    impressions: int


def backfill(
    source_name: str,
    raw: str,
    model: str,
    store: str,
    max_impressions: int = 0,
    memory_gb: float = PrepareConfig.memory_limit_gb,
    threads: int = PrepareConfig.threads,
    spec: str | None = None,
    progress: bool = False,
) -> BackfillResult:
    """Record the last impressions of every user of a raw log.

    Args:
        source_name, raw, spec, memory_gb, threads: see :func:`a2gen_rec.data.prepare.pipeline.prepare`.
        model: folder of the exported model, or what leads to one, see :func:`model_folder`.
        store: a file or an address, see :func:`open_store`.
        last: most impressions of a user; 0 takes as many as a service of the model reads.
        progress: show a bar.

    Raises:
        ConfigError: ``last`` or a bound is out of range, or the source or its spec is impossible.
        DataError: the log breaks its format, or is not of the model's kind.
        UserError: the model or the store cannot be used, or memory ran out. What is recorded by then stays.
    """
    if max_impressions < 0:
        raise ConfigError(f"--max-impressions {max_impressions} must be at least 0")
    PrepareConfig(memory_limit_gb=memory_gb, threads=threads)  # validates both
    folder = resolve_model_dir(model)
    read_manifest(folder)
    card = DatasetCard.load(folder)
    source = sources.open_source(source_name, paths.to_local_path(raw), spec)
    users = latest_impressions(
        source, raw, card, max_impressions or card.max_history + SESSION_MARGIN, memory_gb, threads, progress
    )
    opened = open_store(store)
    try:
        return _record(users, opened)
    except StoreError as error:
        raise UserError(f"{store}: {error}; what is recorded stays, give the same command again") from error
    finally:
        opened.close()


def latest_impressions(
    source: Source,
    raw: str,
    card: DatasetCard,
    max_impressions: int,
    memory_gb: float = PrepareConfig.memory_limit_gb,
    threads: int = PrepareConfig.threads,
    progress: bool = False,
) -> Iterator[tuple[str, list[Impression]]]:
    """Every user of a log and their last impressions, oldest first; memory is bounded as ``prepare``'s is.

    Args:
        raw: the log, as errors name it.
        card: of the model's dataset.
        last: most impressions of a user, at least 1.

    Raises:
        DataError: the log breaks its format, or lacks what the model reads.
        UserError: memory or disk ran out.
    """
    with translate_errors(raw):
        facts = source.describe()
    features = _features(facts, card)
    columns, partitions = StagedColumns.from_source(facts), PrepareConfig.num_partitions
    with tempfile.TemporaryDirectory(prefix="a2gen-backfill-") as scratch:
        folder, connection = Path(scratch), connect(memory_gb, threads, Path(scratch, "spill"))
        try:
            with translate_errors(raw):
                relation = source.impressions(connection)
                spread = folder / "raw"
                read, dropped = staging.partition_by_user(
                    connection, relation, columns, facts.utc_offset_hours, partitions, spread
                )
                if read == sum(dropped.values()):
                    raise DataError(f"no usable impression in {read} rows", file=raw)
                for number in track(range(partitions), "impressions", disable=not progress):
                    file = folder / f"part-{number:05d}.parquet"
                    staging.deduplicate(
                        connection, spread / f"partition={number}", columns, SplitRule(method="time"), file
                    )
                    if file.exists():
                        rows = _latest_rows(connection, file, columns, features, max_impressions)
                        for user, own in groupby(rows, itemgetter("user_id")):
                            yield user, [_impression(row, facts, features) for row in own]
                        file.unlink()
        finally:
            connection.close()


def _features(facts: SourceInfo, card: DatasetCard) -> list[str]:
    """Features that are recorded with an impression: all that the model reads, but for those computed from time.

    Those of items too: the log tells them as of then, the model's catalogue only the latest.
    """
    unknown = set(facts.actions) - set(card.predicted_actions)
    if unknown:
        raise DataError(f"the log's action {min(unknown)!r} is none of the model's: it is of another kind of log")
    from_time = features_from_time(card)
    read = [each.name for each in card.features if each.level in ("item", "context")]
    wanted = [name for name in read if name not in from_time and name != ITEM_ID]
    there = {feature.name for feature in facts.features}
    for name in wanted:
        if name not in there:
            raise DataError(f"the model reads it, the log {facts.name} does not have it", field=name)
    return wanted


def _latest_rows(
    connection: duckdb.DuckDBPyConnection, file: Path, columns: StagedColumns, features: Sequence[str], last: int
) -> Iterator[Row]:
    """The last rows of every user of a cleaned partition, user by user, oldest first."""
    # As text and back: the fewest digits that tell a FLOAT, where a plain cast adds those of its rounding.
    seconds = [f"{name}::VARCHAR::DOUBLE AS {name}" for name in ("dwell_s", *columns.action_columns)]
    chosen = ["user_id", ITEM_ID, "ts_ms", *seconds, *(quote_identifier(name) for name in features)]
    reader = connection.sql(f"""
        SELECT {", ".join(chosen)} FROM {read_parquet_sql(file)}
        QUALIFY row_number() OVER (PARTITION BY user_id ORDER BY ts_ms DESC, {ITEM_ID} DESC) <= {last}
        ORDER BY user_id, ts_ms, {ITEM_ID}""").to_arrow_reader(FETCH_ROWS)
    return chain.from_iterable(batch.to_pylist() for batch in reader)


def _impression(row: Row, facts: SourceInfo, features: Sequence[str]) -> Impression:
    happened = [(name, row[f"at_{name}"]) for name in facts.actions if row[f"at_{name}"] is not None]
    return Impression(
        item=row[ITEM_ID],
        ts_ms=row["ts_ms"],
        watch_s=_known(row["dwell_s"]),
        actions=[(name, _known(at_s)) for name, at_s in happened],
        features={name: _known(row[name]) for name in features},
    )


def _known(value: Any) -> Any:
    """None for NaN, which is a log's word for what it did not record."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _record(users: Iterator[tuple[str, list[Impression]]], store: EventStore) -> BackfillResult:
    waiting: deque[Future[None]] = deque()
    count = impressions = 0
    for user, past in users:
        if len(waiting) >= MAX_IN_FLIGHT:
            waiting.popleft().result()
        waiting.append(store.put(user, past))
        count += 1
        impressions += len(past)
    for each in waiting:
        each.result()
    return BackfillResult(count, impressions)
