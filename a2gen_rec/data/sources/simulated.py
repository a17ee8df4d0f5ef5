"""Source of logs written by ``a2gen simulate``."""

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, VectorSource
from a2gen_rec.data.sources.files import check_unique
from a2gen_rec.data.sql import read_parquet_sql
from a2gen_rec.errors import DataError
from a2gen_rec.simulation.population import ACTIONS
from a2gen_rec.simulation.simulator import IMPRESSION_SCHEMA, ITEM_SCHEMA, LABEL_NAME, USER_SCHEMA, VECTORS_FILE
from a2gen_rec.utils import paths


class Simulated:
    """A simulated log in the directory ``raw``: see :func:`a2gen_rec.simulation.simulator.simulate` for its files."""

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
        users, items, parts = self._files()
        for file, key in ((users, "user_id"), (items, "item_id")):
            check_unique(connection, f"FROM {read_parquet_sql(file)}", key, [file])
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
            FROM {read_parquet_sql(*parts)} i
            LEFT JOIN {read_parquet_sql(users)} u ON u.user_id = i.user_id
            LEFT JOIN {read_parquet_sql(items)} v ON v.item_id = i.item_id"""

    def _vectors(self) -> tuple[VectorSource, ...]:
        """Return the content vectors, if the log has any."""
        file = paths.join(self.raw, VECTORS_FILE)
        if not paths.exists(file):
            return ()
        width = pq.read_schema(paths.to_local_path(file)).field("vector").type.list_size
        query = f"SELECT item_id::VARCHAR AS item_id, vector FROM {read_parquet_sql(paths.to_local_path(file))}"
        return (VectorSource("content", width, lambda _: query),)

    def _files(self) -> tuple[str, str, list[str]]:
        """Return the local paths of the user, item and impression files after checking their columns."""
        directory = paths.join(self.raw, "impressions")
        names = [name for name in paths.listdir(directory) if name.endswith(".parquet")]
        if not names:
            raise DataError("no *.parquet files; is this an output directory of `a2gen simulate`?", file=directory)
        users = _checked_local_path(paths.join(self.raw, "users.parquet"), USER_SCHEMA)
        items = _checked_local_path(paths.join(self.raw, "items.parquet"), ITEM_SCHEMA)
        return users, items, [_checked_local_path(paths.join(directory, name), IMPRESSION_SCHEMA) for name in names]


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
