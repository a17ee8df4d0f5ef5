"""Backfill of an event store with the latest impressions of a raw log (``a2gen backfill``).

The log is read by its source and cleaned as in ``prepare``, so that histories match the training data. Impressions
that are already stored are replaced: an interrupted backfill can be repeated, and the store may be in use.
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

from a2gen_rec.artifact.artifact import ITEMS
from a2gen_rec.artifact.manifest import read_manifest
from a2gen_rec.artifact.model_dir import resolve_model_dir
from a2gen_rec.config import PrepareConfig
from a2gen_rec.data import sources
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.prepare import staging
from a2gen_rec.data.prepare.staging import StagedColumns
from a2gen_rec.data.schema import ITEM_ID
from a2gen_rec.data.sources.base import Source, SourceInfo, SplitRule
from a2gen_rec.data.sql import connect, fetch_one, quote_identifier, read_parquet_sql, translate_errors
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.ranking.types import Impression
from a2gen_rec.serving.engine.history_cache import SESSION_MARGIN
from a2gen_rec.serving.stores.base import EventStore, StoreError
from a2gen_rec.serving.stores.factory import open_store
from a2gen_rec.utils import paths

MAX_IN_FLIGHT = 1024
"""Maximum number of users with pending writes; stores commit many together."""
FETCH_ROWS = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class BackfillResult:
    """Number of users and of their recorded impressions."""

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
    """Record the latest impressions of every user of a raw log.

    Args:
        source_name: See :func:`a2gen_rec.data.prepare.pipeline.prepare`.
        raw: See there.
        model: Path of the exported model, see :func:`resolve_model_dir`.
        store: Path or address of the event store, see :func:`open_store`.
        max_impressions: Maximum number of impressions per user; 0 takes as many as a service with this model reads.
        memory_gb: See :func:`a2gen_rec.data.prepare.pipeline.prepare`.
        threads: See there.
        spec: See there.
        progress: Show a progress bar.

    Raises:
        ConfigError: ``max_impressions`` or a resource limit is out of range, or the source or its spec is invalid.
        DataError: The log has an invalid format, or does not match the model.
        UserError: The model or the store cannot be used, or memory ran out. Impressions recorded before are kept.
    """
    if max_impressions < 0:
        raise ConfigError(f"--max-impressions {max_impressions} must be at least 0")
    PrepareConfig(memory_limit_gb=memory_gb, threads=threads)  # validates both
    model_dir = resolve_model_dir(model)
    read_manifest(model_dir)
    card = DatasetCard.load(model_dir)
    source = sources.open_source(source_name, paths.to_local_path(raw), spec)
    users = latest_impressions(
        source,
        raw,
        card,
        max_impressions or card.max_history + SESSION_MARGIN,
        memory_gb,
        threads,
        progress,
        paths.join(model_dir, ITEMS),
    )
    first = next(users)  # before the store is created: errors of the log leave nothing behind
    event_store = open_store(store)
    try:
        return _record(chain([first], users), event_store)
    except StoreError as error:
        raise UserError(
            f"{store}: {error}; already recorded impressions are kept, rerun the command to continue"
        ) from error
    finally:
        event_store.close()


def latest_impressions(
    source: Source,
    raw: str,
    card: DatasetCard,
    max_impressions: int,
    memory_gb: float = PrepareConfig.memory_limit_gb,
    threads: int = PrepareConfig.threads,
    progress: bool = False,
    known_items: str = "",
) -> Iterator[tuple[str, list[Impression]]]:
    """Yield every user of a log with the latest impressions, oldest first; memory is bounded as in ``prepare``.

    Args:
        source: Source of the log.
        raw: Path of the log for error messages.
        card: Card of the model's dataset.
        max_impressions: Maximum number of impressions per user, at least 1.
        memory_gb: See :func:`backfill`.
        threads: See :func:`backfill`.
        progress: Show a progress bar.
        known_items: Item file of the model, of which the log must contain an item; empty for no check.

    Raises:
        DataError: The log has an invalid format, lacks inputs of the model, or has none of its items.
        UserError: Memory or disk ran out.
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
                partitioned = folder / "raw"
                num_rows, dropped = staging.partition_by_user(
                    connection, relation, columns, facts, partitions, partitioned
                )
                if num_rows == sum(dropped.values()):
                    raise DataError(f"no usable impression in {num_rows} rows", file=raw)
                if known_items:
                    _check_known_items(connection, partitioned, known_items, raw)
                for number in track(range(partitions), "impressions", disable=not progress):
                    file = folder / f"part-{number:05d}.parquet"
                    staging.deduplicate(
                        connection, staging.partition_dir(partitioned, number), columns, SplitRule(method="time"), file
                    )
                    if file.exists():
                        rows = _latest_rows(connection, file, columns, features, max_impressions)
                        for user, user_rows in groupby(rows, itemgetter("user_id")):
                            yield user, [_impression(row, facts, features) for row in user_rows]
                        file.unlink()
        finally:
            connection.close()


def _features(facts: SourceInfo, card: DatasetCard) -> list[str]:
    """Return the features to record with each impression: all that the model reads, except those computed from time.

    Item features are included: the log has their values at the time, the model only the latest.
    """
    unknown = set(facts.actions) - set(card.predicted_actions)
    if unknown:
        raise DataError(f"the model has no action {min(unknown)!r}; was it trained on another kind of log?")
    from_time = card.time_features
    inputs = [each.name for each in card.inputs if each.level in ("item", "context")]
    required = [name for name in inputs if name not in from_time and name != ITEM_ID]
    available, expected = {each.name: each for each in facts.features}, {each.name: each for each in card.inputs}
    for name in required:
        if name not in available:
            raise DataError(f"required by the model but missing from the log {facts.name}", field=name)
        kind = available[name].kind
        if kind != expected[name].kind:
            raise DataError(f"is of kind {kind} in the log, but {expected[name].kind} in the model", field=name)
    return required


def _check_known_items(connection: duckdb.DuckDBPyConnection, staged: Path, known_items: str, raw: str) -> None:
    """Raise DataError if the model knows no item of a staged log: it is another log, or has other identifiers."""
    log = f"SELECT DISTINCT {ITEM_ID} FROM {read_parquet_sql(staged, pattern='*/*.parquet')} WHERE drop_reason IS NULL"
    known = f"SELECT item FROM {read_parquet_sql(paths.to_local_path(known_items))}"
    count, num_known = fetch_one(connection, f"SELECT count(*), count(*) FILTER ({ITEM_ID} IN ({known})) FROM ({log})")
    if not num_known:
        raise DataError(f"none of its {count:,} items is known to the model ({known_items})", file=raw, field=ITEM_ID)


def _latest_rows(
    connection: duckdb.DuckDBPyConnection,
    file: Path,
    columns: StagedColumns,
    features: Sequence[str],
    max_impressions: int,
) -> Iterator[Row]:
    """Return the latest rows of every user of a cleaned partition, user by user, oldest first."""
    # Via text: the shortest decimal that identifies a FLOAT; a plain cast would add digits of its rounding error.
    seconds = [f"{name}::VARCHAR::DOUBLE AS {name}" for name in ("dwell_s", *columns.action_columns)]
    labels = [quote_identifier(f"label_{name}") for name in columns.labels]
    selected = ["user_id", ITEM_ID, "ts_ms", *seconds, *labels, *(quote_identifier(name) for name in features)]
    reader = connection.sql(f"""
        SELECT {", ".join(selected)} FROM {read_parquet_sql(file)}
        QUALIFY row_number() OVER (PARTITION BY user_id ORDER BY ts_ms DESC, {ITEM_ID} DESC) <= {max_impressions}
        ORDER BY user_id, ts_ms, {ITEM_ID}""").to_arrow_reader(FETCH_ROWS)
    return chain.from_iterable(batch.to_pylist() for batch in reader)


def _impression(row: Row, facts: SourceInfo, features: Sequence[str]) -> Impression:
    times = {name: row[f"at_{name}"] for name in facts.actions}
    labels = {name: _none_if_nan(row[f"label_{name}"]) for name in facts.labels}
    return Impression(
        item=row[ITEM_ID],
        ts_ms=row["ts_ms"],
        watch_s=_none_if_nan(row["dwell_s"]),
        actions=[(name, _none_if_nan(time_s)) for name, time_s in times.items() if time_s is not None],
        features={name: _request_value(row[name]) for name in features},
        labels={name: bool(value) for name, value in labels.items() if value is not None},
    )


def _request_value(value: Any) -> Any:
    """Return a raw value as in a request: lists of equal weights as lists, others as mappings of texts to weights."""
    if not isinstance(value, list):
        return _none_if_nan(value)
    if all(each["weight"] == 1 for each in value):
        return [each["value"] for each in value]
    return {each["value"]: each["weight"] for each in value}


def _none_if_nan(value: Any) -> Any:
    """Return None for NaN, which stands for values that the log does not record."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _record(users: Iterator[tuple[str, list[Impression]]], store: EventStore) -> BackfillResult:
    pending: deque[Future[None]] = deque()
    num_users = num_impressions = 0
    for user, impressions in users:
        if len(pending) >= MAX_IN_FLIGHT:
            pending.popleft().result()
        pending.append(store.put(user, impressions))
        num_users += 1
        num_impressions += len(impressions)
    for future in pending:
        future.result()
    return BackfillResult(num_users, num_impressions)
