"""The folder that ``a2gen simulate`` writes, as a source."""

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo
from a2gen_rec.data.sql import read_parquet_sql
from a2gen_rec.errors import DataError
from a2gen_rec.simulation.population import ACTIONS
from a2gen_rec.simulation.simulator import IMPRESSION_SCHEMA, ITEM_SCHEMA, LABEL_NAME, USER_SCHEMA
from a2gen_rec.utils import paths


class Simulated:
    """A simulated log in the folder ``raw``: see :func:`a2gen_rec.simulation.simulator.simulate` for its files."""

    def __init__(self, raw: str) -> None:
        self.raw = raw

    def describe(self) -> SourceInfo:
        """What the log offers; checks that the files and columns are there.

        Raises:
            DataError: a file or column is missing, or of another type.
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
            licence="made by a2gen simulate; no rights reserved",
        )

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        """SQL of the standard relation (:mod:`a2gen_rec.data.sources.base`); creates nothing on ``connection``.

        Raises:
            DataError: a file or column is missing, or of another type.
        """
        users, items, parts = self._files()
        at = ", ".join(f'i."{action}" AS "at_{action}"' for action in ACTIONS)
        oracle = ", ".join(f'i."true_{name}" AS "oracle_{name}"' for name in (*ACTIONS, LABEL_NAME))
        return f"""
            SELECT
                CAST(i.user_id AS VARCHAR) AS user_id, CAST(i.item_id AS VARCHAR) AS item_id,
                i.ts_ms, i.dwell_s, {at}, CAST(i."{LABEL_NAME}" AS DOUBLE) AS "label_{LABEL_NAME}",
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

    def _files(self) -> tuple[str, str, list[str]]:
        """Local paths of the users', the items' and the impressions' files, their columns checked."""
        folder = paths.join(self.raw, "impressions")
        names = [name for name in paths.listdir(folder) if name.endswith(".parquet")]
        if not names:
            raise DataError("no *.parquet files; is this a folder that `a2gen simulate` wrote?", file=folder)
        users = _checked(paths.join(self.raw, "users.parquet"), USER_SCHEMA)
        items = _checked(paths.join(self.raw, "items.parquet"), ITEM_SCHEMA)
        return users, items, [_checked(paths.join(folder, name), IMPRESSION_SCHEMA) for name in names]


def _checked(file: str, schema: pa.Schema) -> str:
    if not paths.exists(file):
        raise DataError("no such file; is this a folder that `a2gen simulate` wrote?", file=file)
    local = paths.to_local_path(file)
    try:
        found = pq.read_schema(local)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file ({error})", file=file) from error
    for expected in schema:
        if expected.name not in found.names:
            raise DataError("no such column", file=file, field=expected.name)
        if found.field(expected.name).type != expected.type:
            reason = f"is {found.field(expected.name).type}, expected {expected.type}"
            raise DataError(reason, file=file, field=expected.name)
    return local
