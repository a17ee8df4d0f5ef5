"""Admission of values to the rows of a vocabulary's table, in SQL [ours].

A value is admitted once it has enough training impressions in all datasets of its lineage. It then keeps its row until
it has not been seen for ``ttl_days``. Candidates take free rows by falling count, then by value: first the rows that no
value has had, then those of retired values. A single log is the case without an earlier vocabulary.

Columns of ``vocabulary/FEATURE.parquet``, sorted by ``row``::

    value     VARCHAR  raw value
    row       BIGINT   row of the table, from 1
    count     BIGINT   training impressions in all datasets of the lineage
    last_ms   BIGINT   start of the last impression
    admitted  BIGINT   index in the lineage of the dataset that admitted the value, from 0
    reused    BOOLEAN  whether a retired value had the row before

A model that was trained on the first ``n`` datasets of the lineage knows the values with ``admitted < n`` only.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.schema import FeatureSpec, VocabularyRows
from a2gen_rec.data.sql import fetch_one, quote_identifier, read_parquet_sql, write_sorted

DAY_MS = 86_400_000
COUNTS, KEPT, RANKED = "counts of values", "kept values", "ranked values"


@dataclass(frozen=True)
class EarlierVocabulary:
    """The vocabulary that an increment continues.

    Attributes:
        file: vocabulary file.
        pending_file: values without a row: ``value``, ``count`` of all impressions, and ``last_ms``.
        cardinality: number of rows of the table.
        next_row: first row that no value has had.
    """

    file: Path
    pending_file: Path
    cardinality: int
    next_row: int


@dataclass(frozen=True)
class AdmissionRule:
    """Conditions of an admission.

    Attributes:
        min_count: minimum training impressions of a value.
        capacity: rows per value of a new or grown table; 0 for 1 in a new table, and for no growth.
        max_values: maximum number of values; 0 for no limit.
        min_values: minimum number of values for which a new table has rows.
        increment: index of the dataset in its lineage.
        retire_before_ms: values last seen before this time lose their row; None for never.
    """

    min_count: int
    capacity: float = 0.0
    max_values: int = 0
    min_values: int = 0
    increment: int = 0
    retire_before_ms: int | None = None


def admit_values(
    connection: duckdb.DuckDBPyConnection,
    impressions: str,
    spec: FeatureSpec,
    rule: AdmissionRule,
    file: Path,
    pending_file: Path | None = None,
    earlier: EarlierVocabulary | None = None,
) -> tuple[int, VocabularyRows]:
    """Write the vocabulary of a feature after the relation ``impressions``.

    Args:
        connection: DuckDB connection.
        impressions: relation with the raw values, ``ts_ms`` and ``split``.
        spec: vocabulary feature.
        rule: conditions.
        file: vocabulary file to write.
        pending_file: file of the values without a row to write; None for none.
        earlier: vocabulary to continue; None for a new one.

    Returns:
        Number of rows of the table, and their use.
    """
    counts, kept, ranked = (quote_identifier(f"{name} of {spec.name}") for name in (COUNTS, KEPT, RANKED))
    column = quote_identifier(spec.name)
    value = f"unnest({column}).value" if spec.multi_valued else column
    values = f"SELECT {value} AS value, ts_ms, split FROM {impressions}"
    seen = f"""SELECT value, count(*) AS total, count(*) FILTER (split = 0) AS train, max(ts_ms) AS last_ms
        FROM ({values}) WHERE value IS NOT NULL GROUP BY value"""
    alive = "true" if rule.retire_before_ms is None else f"last_ms >= {rule.retire_before_ms}"
    connection.execute(f"CREATE TEMP TABLE {counts} AS {seen}")
    known, pending = _earlier_relations(earlier)
    connection.execute(
        f"""CREATE TEMP TABLE {kept} AS SELECT * FROM (
            SELECT value, known."row", known.count + coalesce(new.train, 0) AS count,
                greatest(known.last_ms, new.last_ms) AS last_ms, admitted, reused
            FROM ({known}) AS known LEFT JOIN {counts} AS new USING (value)) WHERE {alive}"""
    )
    unadmitted = f"""SELECT value, coalesce(pending.count, 0) + coalesce(new.train, 0) AS count,
            coalesce(pending.count, 0) + coalesce(new.total, 0) AS total,
            greatest(pending.last_ms, new.last_ms) AS last_ms
        FROM ({pending}) AS pending FULL JOIN {counts} AS new USING (value)
        WHERE value NOT IN (SELECT value FROM ({known}))"""
    connection.execute(
        f"""CREATE TEMP TABLE {ranked} AS SELECT *, CASE WHEN count >= {max(rule.min_count, 1)} THEN
            row_number() OVER (ORDER BY count < {max(rule.min_count, 1)}, count DESC, value) END AS rank
        FROM ({unadmitted}) WHERE {alive}"""
    )
    (num_known,) = fetch_one(connection, f"SELECT count(*) FROM ({known})")
    (num_kept,) = fetch_one(connection, f"SELECT count(*) FROM {kept}")
    (num_candidates,) = fetch_one(connection, f"SELECT count(rank) FROM {ranked}")
    next_row = earlier.next_row if earlier is not None else 1
    cardinality = _cardinality(rule, num_kept, num_candidates, earlier)
    num_free = cardinality - 1 - num_kept
    num_admitted = min(num_candidates, num_free)
    num_reused = max(0, num_admitted - (cardinality - next_row))
    write_sorted(
        connection,
        f"""SELECT value, "row"::BIGINT AS "row", count::BIGINT AS count, last_ms::BIGINT AS last_ms,
            admitted::BIGINT AS admitted, reused FROM {kept}
        UNION ALL
        SELECT value, free."row", count::BIGINT, last_ms, {rule.increment}::BIGINT, free."row" < {next_row}
        FROM {ranked} AS ranked JOIN ({_free_rows_sql(kept, next_row, cardinality)}) AS free USING (rank)
        ORDER BY "row" """,
        file,
    )
    if pending_file is not None:
        query = f"SELECT value, total::BIGINT AS count, last_ms FROM {ranked}"
        write_sorted(connection, f"{query} WHERE rank IS NULL OR rank > {num_admitted} ORDER BY value", pending_file)
    for table in (counts, kept, ranked):
        connection.execute(f"DROP TABLE {table}")
    return cardinality, VocabularyRows(
        next_row=next_row + num_admitted - num_reused,
        values=num_kept + num_admitted,
        admitted=num_admitted,
        reused=num_reused,
        retired=num_known - num_kept,
        waiting=num_candidates - num_admitted,
    )


def _earlier_relations(earlier: EarlierVocabulary | None) -> tuple[str, str]:
    """Return the queries of the values with a row, and of those without."""
    if earlier is None:
        columns = 'NULL::BIGINT AS "row", NULL::BIGINT AS admitted, NULL::BOOLEAN AS reused'
        empty = "SELECT NULL::VARCHAR AS value, NULL::BIGINT AS count, NULL::BIGINT AS last_ms"
        return f"SELECT *, {columns} FROM ({empty}) WHERE false", f"{empty} WHERE false"
    return f"SELECT * FROM {read_parquet_sql(earlier.file)}", f"SELECT * FROM {read_parquet_sql(earlier.pending_file)}"


def _cardinality(rule: AdmissionRule, num_kept: int, num_candidates: int, earlier: EarlierVocabulary | None) -> int:
    """Return the number of rows of a new table, or of an earlier one, which may have grown."""
    limit = rule.max_values or math.inf
    if earlier is None:
        values = max(rule.min_values, math.ceil((rule.capacity or 1.0) * min(num_candidates, limit)))
        return 1 + int(min(values, limit))
    needed = num_kept + num_candidates
    if not rule.capacity or needed <= earlier.cardinality - 1:
        return earlier.cardinality
    return max(earlier.cardinality, 1 + int(min(math.ceil(rule.capacity * needed), limit)))


def _free_rows_sql(kept: str, next_row: int, cardinality: int) -> str:
    """Return the query of the free rows and their ranks, from 1: rows that no value has had come first."""
    rows = f'SELECT range AS "row" FROM range(1, {cardinality})'
    return f"""SELECT "row", row_number() OVER (ORDER BY "row" < {next_row}, "row") AS rank
        FROM ({rows}) WHERE "row" NOT IN (SELECT "row" FROM {kept})"""
