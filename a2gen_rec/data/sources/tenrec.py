"""Tenrec: video feeds of QQ Browser and QQ Kandian (Yuan et al., NeurIPS 2022 Datasets and Benchmarks).

The log has no times; rows are in order of exposure, and the row number replaces the time. ``watching_times`` is an
outcome of the impression and not an input.
"""

from collections.abc import Mapping
from pathlib import Path

import duckdb

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sources.files import RawFiles, find_files
from a2gen_rec.data.sources.values import Column, Value, count, identifier, text
from a2gen_rec.data.sql import quote_identifier
from a2gen_rec.errors import DataError

ACTIONS = ("like", "share", "follow")
FLAGS = ("click", *ACTIONS)
FEATURES = ("gender", "age", "video_category")


class Tenrec:
    """One file such as ``QB-video.csv``, ``QK-video.csv`` or ``ctr_data_1M.csv``, or a directory with one file.

    Raises:
        DataError: there is not exactly one file, or a column is missing.
    """

    def __init__(self, raw: str) -> None:
        files = [Path(raw)] if Path(raw).is_file() else find_files(Path(raw), "*.csv")
        if len(files) != 1:
            raise DataError(f"has {len(files)} files *.csv; pass the path of one file", file=raw)
        self.file = RawFiles(files, ("user_id", "item_id", *FLAGS, *FEATURES))

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
        log = self.file.relation(connection, _values)
        connection.execute("SET preserve_insertion_order = true")
        actions = ", ".join(
            f"CASE WHEN {quote_identifier(name)} > 0 THEN 'nan'::DOUBLE END AS at_{name}" for name in ACTIONS
        )
        return f"""
            SELECT user_id, item_id, row_number() OVER () * 1000 AS ts_ms, 'nan'::DOUBLE AS dwell_s, {actions},
                (click > 0)::INT::DOUBLE AS label_click, {", ".join(FEATURES)}, NULL AS drop_reason
            FROM ({log})"""


def _values(columns: Mapping[str, Column]) -> dict[str, Value]:
    return {
        "user_id": identifier([columns["user_id"]]),
        "item_id": identifier([columns["item_id"]]),
        **{name: count([columns[name]]) for name in FLAGS},
        **{name: text([columns[name]]) for name in FEATURES},
    }
