"""The carry: what the next increment needs of a dataset's past.

Files below ``carry/`` of a dataset. Values are raw: values admitted later get their rows in earlier impressions too::

    source.yaml                     facts of the source, and settings that all increments share
    history/part-NNNNN.parquet      per user: the latest ``max_history + 2`` clean impressions (``staging.py``), and
                                    the position of each in its session
    items.parquet, users.parquet    per item or user: latest known value of each feature with its time, last
                                    impression; per item: impressions and positives of all splits
    pending/FEATURE.parquet         values of a vocabulary without a row: impressions, last impression
    statistics/FEATURE.parquet      sums of the statistics per value: until the last day, and of the last day

``max_history + 2``: windows have one impression more than the history, and the gap before the first of them is known
from the one before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import yaml

from a2gen_rec.data.features.sessions import SESSION_COUNT, SESSION_GAP_S
from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo
from a2gen_rec.data.sql import quote_identifier, read_parquet_sql, write_sorted
from a2gen_rec.errors import DataError

CARRY_DIR = "carry"


@dataclass(frozen=True)
class CarryFiles:
    """Paths of the carry in the directory of a dataset."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / CARRY_DIR / "source.yaml"

    def history(self, partition: int) -> Path:
        return self.folder / CARRY_DIR / "history" / f"part-{partition:05d}.parquet"

    def entities(self, level: str) -> Path:
        return self.folder / CARRY_DIR / f"{level}s.parquet"

    def pending(self, feature: str) -> Path:
        return self.folder / CARRY_DIR / "pending" / f"{feature}.parquet"

    def statistics(self, feature: str) -> Path:
        return self.folder / CARRY_DIR / "statistics" / f"{feature}.parquet"

    def write_source(self, source: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Write the facts of :func:`describe_source`, and settings."""
        self.source.parent.mkdir(parents=True, exist_ok=True)
        content = {"source": source, "settings": settings}
        self.source.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def read_source(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the facts of the source, and the settings.

        Raises:
            DataError: the file is missing or invalid.
        """
        try:
            content = yaml.safe_load(self.source.read_text(encoding="utf-8"))
            return dict(content["source"]), dict(content["settings"])
        except FileNotFoundError:
            raise DataError("not found: the dataset was prepared with --carry false", file=self.source) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"invalid ({str(error).splitlines()[0]})", file=self.source) from error


def describe_source(info: SourceInfo, features: Sequence[FeatureSpec]) -> dict[str, Any]:
    """Return the facts of a source that must be equal in all increments, as plain data."""
    plain = {x.name: {k: v for k, v in asdict(x).items() if k != "name"} for x in features}
    return {
        "name": info.name,
        "actions": list(info.actions),
        "labels": list(info.labels),
        "negative_actions": list(info.negative_actions),
        "duration_feature": info.duration_feature,
        "has_calendar_time": info.has_calendar_time,
        "has_elapsed_time": info.has_elapsed_time,
        "time_zone": info.time_zone.name,
        "utc_offset_hours": float(info.time_zone.utc_offset_hours),
        "oracle": list(info.oracle),
        "features": {name: {**x, "edges": list(x["edges"])} for name, x in plain.items()},
        "vectors": {vector.name: {"width": vector.width} for vector in info.vectors},
    }


def source_difference(current: Any, base: Any, path: str = "") -> str:
    """Return the first difference of two results of :func:`describe_source`; empty if there is none."""
    if not (isinstance(current, dict) and isinstance(base, dict)):
        return "" if current == base else f"{path} is {current!r}, but {base!r}"
    for name in base | current:
        where = f"{path} {name}".strip()
        if name not in current:
            return f"{where} is missing"
        if name not in base:
            return f"{where} is additional"
        if difference := source_difference(current[name], base[name], where):
            return difference
    if list(current) != list(base):
        return f"{path} have another order".strip()
    return ""


def past_and_present_sql(present: str, clean: Path, earlier: Path | None) -> str:
    """Return the relation of a partition's impressions, and of the histories of their users with split -1.

    Args:
        present: query of the clean impressions of the log, with ``split``.
        clean: file of these impressions.
        earlier: histories of the base; None or missing for none.
    """
    if earlier is None or not earlier.exists():
        return f"({present})"
    past = f"SELECT *, (-1)::TINYINT AS split FROM {read_parquet_sql(earlier)}"
    past += f" WHERE user_id IN (SELECT user_id FROM {read_parquet_sql(clean)})"
    return f"({present} UNION ALL BY NAME {past})"


def write_history(
    connection: duckdb.DuckDBPyConnection,
    clean: Path,
    earlier: Path | None,
    file: Path,
    max_impressions: int,
    retire_before_ms: int | None,
) -> None:
    """Write the latest impressions of a partition's users, after clean impressions and the histories of the base.

    Args:
        connection: DuckDB connection.
        clean: clean impressions of the log; missing for none.
        earlier: histories of the base; None or missing for none.
        file: file to write; not written without impressions.
        max_impressions: maximum number of impressions per user.
        retire_before_ms: users without an impression since then are forgotten; None for never.
    """
    relations = []
    if clean.exists():
        relations.append(_latest_sql(clean, earlier, max_impressions))
    if earlier is not None and earlier.exists():
        past = read_parquet_sql(earlier)
        users = f"SELECT user_id FROM {past} GROUP BY user_id"
        if retire_before_ms is not None:
            users += f" HAVING max(ts_ms) >= {retire_before_ms}"
        if clean.exists():
            users += f" EXCEPT SELECT user_id FROM {read_parquet_sql(clean)}"
        relations.append(f"SELECT * FROM {past} WHERE user_id IN ({users})")
    if relations:
        write_sorted(connection, f"{' UNION ALL BY NAME '.join(relations)} ORDER BY user_id, ts_ms, item_id", file)


def _latest_sql(clean: Path, earlier: Path | None, max_impressions: int) -> str:
    """Return the query of the latest impressions of the users of a log, with their positions in sessions."""
    count, gap_ms = quote_identifier(SESSION_COUNT), round(1000 * SESSION_GAP_S)
    # Splits are of one dataset. Positions of earlier impressions count from the start of their session.
    present = f"SELECT COLUMNS(lambda c: c <> 'split'), 0::TINYINT AS split, NULL::BIGINT AS {count}"
    merged = past_and_present_sql(f"{present} FROM {read_parquet_sql(clean)}", clean, earlier)
    added = ("split", "starts session", "session of user", "from the last", SESSION_COUNT)
    return f"""SELECT * EXCLUDE ({", ".join(map(quote_identifier, added))}),
            (row_number() OVER session + coalesce(first_value({count}) OVER session, 1) - 1)::BIGINT AS {count}
        FROM (SELECT *, sum("starts session"::INT) OVER (PARTITION BY user_id ORDER BY ts_ms, item_id)
                AS "session of user"
            FROM (SELECT *, coalesce(ts_ms - lag(ts_ms) OVER of_user > {gap_ms}, true) AS "starts session",
                    row_number() OVER (PARTITION BY user_id ORDER BY ts_ms DESC, item_id DESC) AS "from the last"
                FROM {merged} WINDOW of_user AS (PARTITION BY user_id ORDER BY ts_ms, item_id)))
        WINDOW session AS (PARTITION BY user_id, "session of user" ORDER BY ts_ms, item_id)
        QUALIFY "from the last" <= {max_impressions}"""
