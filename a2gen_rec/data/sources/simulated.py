"""Source of logs written by ``a2gen simulate``."""

from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, VectorSource
from a2gen_rec.data.sources.files import check_unique
from a2gen_rec.data.sql import read_parquet_sql
from a2gen_rec.errors import DataError
from a2gen_rec.simulation.log_files import (
    IMPRESSION_SCHEMA,
    IMPRESSIONS_DIR,
    ITEM_SCHEMA,
    ITEMS_FILE,
    LABEL_NAME,
    USER_SCHEMA,
    USERS_FILE,
    VECTORS_FILE,
)
from a2gen_rec.simulation.population import ACTIONS
from a2gen_rec.utils import paths


@dataclass(frozen=True)
class LogFiles:
    """Local paths of the files of a log, of all days.

    Attributes:
        users: files of users.
        items: files of videos.
        impressions: files of impressions.
    """

    users: list[str]
    items: list[str]
    impressions: list[str]


class Simulated:
    """A simulated log in the directory ``raw``, or one day of it: see :mod:`a2gen_rec.simulation.log_files`."""

    def __init__(self, raw: str) -> None:
        self.raw = raw

    def describe(self) -> SourceInfo:
        """Return the metadata of the log and check its files and columns.

        Raises:
            DataError: a file or column is missing, or a column has another type.
        """
        self._files()
        return SourceInfo(
            name="simulated",
            actions=ACTIONS,
            labels=(LABEL_NAME,),
            duration_feature="duration_s",
            oracle=(*ACTIONS, LABEL_NAME),
            features=(
                FeatureSpec("user_id", "user"),
                FeatureSpec("group", "user"),
                FeatureSpec("age_band", "user"),
                FeatureSpec("activity_level", "user"),
                FeatureSpec("item_id", "item"),
                FeatureSpec("author_id", "item"),
                FeatureSpec("category", "item"),
                FeatureSpec("upload_type", "item"),
                FeatureSpec("duration_s", "item", kind="buckets", size=16),
                FeatureSpec("tab", "context"),
            ),
            vectors=self._vectors(),
            licence="made by a2gen simulate; no rights reserved",
        )

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        """Return the SQL of the standard relation (:mod:`a2gen_rec.data.sources.base`).

        Raises:
            DataError: a file or column is missing, a column has another type, or users or items occur several times.
        """
        files = self._files()
        users = _distinct_rows(connection, files.users, USER_SCHEMA)
        items = _distinct_rows(connection, files.items, ITEM_SCHEMA)
        action_columns = ", ".join(f'i."{action}" AS "at_{action}"' for action in ACTIONS)
        oracle = ", ".join(f'i."true_{name}" AS "oracle_{name}"' for name in (*ACTIONS, LABEL_NAME))
        return f"""
            SELECT
                CAST(i.user_id AS VARCHAR) AS user_id, CAST(i.item_id AS VARCHAR) AS item_id,
                i.ts_ms, i.dwell_s, {action_columns}, CAST(i."{LABEL_NAME}" AS DOUBLE) AS "label_{LABEL_NAME}",
                CAST(u."group" AS VARCHAR) AS "group", u.age_band, u.activity_level,
                CAST(v.author_id AS VARCHAR) AS author_id, CAST(v.category AS VARCHAR) AS category,
                v.upload_type, v.duration_s, i.tab, {oracle},
                CASE
                    WHEN u.user_id IS NULL THEN 'user not in users.parquet'
                    WHEN v.item_id IS NULL THEN 'item not in items.parquet'
                    WHEN i.ts_ms IS NULL THEN 'no time'
                END AS drop_reason
            FROM {read_parquet_sql(*files.impressions)} i
            LEFT JOIN ({users}) u ON u.user_id = i.user_id
            LEFT JOIN ({items}) v ON v.item_id = i.item_id"""

    def _days(self) -> list[str]:
        """Return the directories of the days: ``raw`` itself, or the subdirectories of a log of several days."""
        if paths.exists(paths.join(self.raw, IMPRESSIONS_DIR)):
            return [self.raw]
        folders = [paths.join(self.raw, name) for name in paths.listdir(self.raw)]
        return [folder for folder in folders if paths.exists(paths.join(folder, IMPRESSIONS_DIR))] or [self.raw]

    def _vectors(self) -> tuple[VectorSource, ...]:
        """Return the content vectors, if the log has any."""
        files = [file for day in self._days() if paths.exists(file := paths.join(day, VECTORS_FILE))]
        if not files:
            return ()
        local = [paths.to_local_path(file) for file in files]
        width = pq.read_schema(local[0]).field("vector").type.list_size
        # A video has the same vector on every day.
        vectors = f"SELECT item_id::VARCHAR AS item_id, any_value(vector) AS vector FROM {read_parquet_sql(*local)}"
        query = f"{vectors} GROUP BY item_id"
        return (VectorSource("content", width, lambda _: query),)

    def _files(self) -> LogFiles:
        """Return the files of users, videos and impressions after checking their columns."""
        files = LogFiles([], [], [])
        for day in self._days():
            directory = paths.join(day, IMPRESSIONS_DIR)
            names = [name for name in paths.listdir(directory) if name.endswith(".parquet")]
            if not names:
                raise DataError("no *.parquet files; is this an output directory of `a2gen simulate`?", file=directory)
            files.users.append(_checked_local_path(paths.join(day, USERS_FILE), USER_SCHEMA))
            files.items.append(_checked_local_path(paths.join(day, ITEMS_FILE), ITEM_SCHEMA))
            files.impressions.extend(
                _checked_local_path(paths.join(directory, name), IMPRESSION_SCHEMA) for name in names
            )
        return files


def _distinct_rows(connection: duckdb.DuckDBPyConnection, files: list[str], schema: pa.Schema) -> str:
    """Return the SQL of the rows of all days, each user or video once.

    Raises:
        DataError: a user or video occurs several times in a file, or differs between files.
    """
    key = schema.names[0]
    for file in files:
        check_unique(connection, f"FROM {read_parquet_sql(file)}", key, [file])
    if len(files) == 1:
        return f"FROM {read_parquet_sql(*files)}"
    columns = ", ".join(f'"{name}"' for name in schema.names)
    distinct = f"SELECT DISTINCT {columns} FROM {read_parquet_sql(*files)}"
    check_unique(connection, distinct, key, files)
    return distinct


def _checked_local_path(file: str, schema: pa.Schema) -> str:
    if not paths.exists(file):
        raise DataError("file not found; is this an output directory of `a2gen simulate`?", file=file)
    local = paths.to_local_path(file)
    try:
        actual = pq.read_schema(local)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file ({error})", file=file) from error
    for expected in schema:
        if expected.name not in actual.names:
            raise DataError("column is missing", file=file, field=expected.name)
        if actual.field(expected.name).type != expected.type:
            reason = f"is {actual.field(expected.name).type}, expected {expected.type}"
            raise DataError(reason, file=file, field=expected.name)
    return local
