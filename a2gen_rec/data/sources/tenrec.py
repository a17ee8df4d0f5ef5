"""Tenrec: video feeds of QQ Browser and QQ Kandian (Yuan et al., NeurIPS 2022 Datasets and Benchmarks).

The log has no times; rows are in order of exposure, and the row number replaces the time. ``watching_times`` is an
outcome of the impression and not an input.
"""

from pathlib import Path

import duckdb

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sources.files import find_files, read_csv_sql, require_columns
from a2gen_rec.data.sql import quote_identifier
from a2gen_rec.errors import DataError

ACTIONS = ("like", "share", "follow")
FLAGS = ("click", *ACTIONS)


class Tenrec:
    """One file such as ``QB-video.csv``, ``QK-video.csv`` or ``ctr_data_1M.csv``, or a directory with one file.

    Raises:
        DataError: there is not exactly one file, or a column is missing.
    """

    def __init__(self, raw: str) -> None:
        files = [Path(raw)] if Path(raw).is_file() else find_files(Path(raw), "*.csv")
        if len(files) != 1:
            raise DataError(f"has {len(files)} files *.csv; pass the path of one file", file=raw)
        self.file = files[0]
        columns = ("user_id", "item_id", *FLAGS, "video_category", "gender", "age")
        require_columns(self.file, read_csv_sql(files), columns)

    def describe(self) -> SourceInfo:
        return SourceInfo(
            name="tenrec",
            actions=ACTIONS,
            labels=("click",),
            features=(
                FeatureSpec("user_id", "user", min_count=2),
                FeatureSpec("gender", "user"),
                FeatureSpec("age", "user"),
                FeatureSpec("item_id", "item", min_count=2),
                FeatureSpec("video_category", "item"),
            ),
            split=SplitRule(method="last", valid_fraction=0.1, test_fraction=0.1),
            has_calendar_time=False,
            has_elapsed_time=False,
            licence="research use only, after registration",
            citation="Yuan et al., Tenrec: A Large-scale Multipurpose Benchmark Dataset for Recommender Systems, "
            "NeurIPS 2022",
            url="https://github.com/yuangh-x/2022-NIPS-Tenrec",
        )

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        connection.execute("SET preserve_insertion_order = true")
        types = ", ".join(f"'{name}': 'INTEGER'" for name in FLAGS)
        text = ", ".join(f"'{name}': 'VARCHAR'" for name in ("user_id", "item_id", "video_category", "gender", "age"))
        actions = ", ".join(
            f"CASE WHEN {quote_identifier(name)} > 0 THEN 'nan'::DOUBLE END AS at_{name}" for name in ACTIONS
        )
        return f"""
            SELECT user_id, item_id, row_number() OVER () * 1000 AS ts_ms, 'nan'::DOUBLE AS dwell_s, {actions},
                (click > 0)::INT::DOUBLE AS label_click, gender, age, video_category, NULL AS drop_reason
            FROM {read_csv_sql([self.file], f"types = {{{types}, {text}}}")}"""
