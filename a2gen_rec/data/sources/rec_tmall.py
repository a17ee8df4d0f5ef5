"""Rec-Tmall: clicks, collects, carts and purchases on Tmall (Tianchi dataset 140281).

A click starts an impression, an idle gap of half an hour ends it (``events.py``). The log does not record when a user
leaves a product page: ``exit`` has no time.
"""

import codecs
import tempfile
from pathlib import Path

import duckdb

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources import events
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sources.files import find_files, read_csv_sql, require_columns
from a2gen_rec.data.sql import fetch_one, quote_literal
from a2gen_rec.errors import DataError

SESSIONIZATION_RULES = events.SessionizationRules(
    open_event="click",
    actions={"collect": "collect", "cart": "cart", "alipay": "alipay"},
    idle_gap_s=30 * 60,
)
LOG_COLUMNS = ("item_id", "user_id", "action", "vtime")
PRODUCT_COLUMNS = {"category": "category", "brand": "brand_id", "seller": "seller_id"}
TIME_FORMATS = ("%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%d %H:%M:%S")
UTC_OFFSET_HOURS = 8
CHUNK_BYTES = 1 << 24


class RecTmall:
    """The log's file, or a directory with ``*rec_tmall_log*`` files and optional ``*rec_tmall_product*`` files.

    Raises:
        DataError: a file or column is missing, or (in :meth:`impressions`) an action or time is invalid.
    """

    def __init__(self, raw: str) -> None:
        path = Path(raw)
        self.logs = [path] if path.is_file() else find_files(path, "*rec_tmall_log*")
        self.products = [] if path.is_file() else sorted(path.glob("*rec_tmall_product*"))
        for file in self.logs:
            require_columns(file, read_csv_sql([file]), LOG_COLUMNS)

    def describe(self) -> SourceInfo:
        product = [FeatureSpec(name, "item") for name in PRODUCT_COLUMNS] if self.products else []
        return SourceInfo(
            name="rec_tmall",
            actions=tuple(SESSIONIZATION_RULES.actions),
            features=(
                FeatureSpec("user_id", "user", min_count=2),
                FeatureSpec("item_id", "item", min_count=2),
                *product,
            ),
            split=SplitRule(method="time", valid_fraction=0.1, test_fraction=0.1),
            utc_offset_hours=UTC_OFFSET_HOURS,
            licence="terms of Tianchi dataset 140281",
            citation="Alibaba, Rec-Tmall, Tianchi dataset 140281",
            url="https://tianchi.aliyun.com/dataset/140281",
        )

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        for file in self.logs:
            self.check(connection, file)
        time = f"epoch_ms({parse_time_sql('vtime')}) - {UTC_OFFSET_HOURS * 3_600_000}"
        log = f"(SELECT user_id, item_id, action, {time} AS t_ms FROM {read_csv_sql(self.logs)})"
        relation = events.impressions_from_events(log, SESSIONIZATION_RULES, [])
        if not self.products:
            return relation
        directory = Path(fetch_one(connection, "SELECT current_setting('temp_directory')")[0])
        products = read_csv_sql(
            [transcode_to_utf8(file, directory) for file in self.products], "all_varchar = true, strict_mode = false"
        )
        product_columns = "".join(
            f", any_value(nullif({column}, 'null') ORDER BY {column}) AS {name}"
            for name, column in PRODUCT_COLUMNS.items()
        )
        return f"""SELECT impressions.*, products.* EXCLUDE (id) FROM ({relation}) AS impressions
            LEFT JOIN (SELECT {ITEM_KEY} AS id{product_columns} FROM {products} GROUP BY ALL) AS products
            ON ltrim(impressions.item_id, 'i') = products.id"""

    def check(self, connection: duckdb.DuckDBPyConnection, file: Path) -> None:
        """Check all rows.

        Raises:
            DataError: for the first row with an unknown action or invalid time.
        """
        known = ", ".join(
            quote_literal(value) for value in (SESSIONIZATION_RULES.open_event, *SESSIONIZATION_RULES.actions.values())
        )
        connection.execute("SET preserve_insertion_order = true")
        invalid = connection.execute(
            f"""SELECT row, action, vtime, {parse_time_sql("vtime")} FROM (
                SELECT row_number() OVER () + 1 AS row, action, vtime FROM {read_csv_sql([file])})
            WHERE action IS NULL OR action NOT IN ({known}) OR {parse_time_sql("vtime")} IS NULL ORDER BY row LIMIT 1"""
        ).fetchall()
        connection.execute("SET preserve_insertion_order = false")
        for row, action, time, parsed_time in invalid:
            if parsed_time is None:
                raise DataError(
                    f"invalid time {time!r}; expected e.g. 2014/9/18 15:03", file=file, row=row, field="vtime"
                )
            raise DataError(f"unknown action {action!r}", file=file, row=row, field="action")


ITEM_KEY = "ltrim(item_id, 'i')"


def parse_time_sql(column: str) -> str:
    """Return the SQL of a local time, NULL for an invalid time."""
    return f"try_strptime({column}, [{', '.join(quote_literal(style) for style in TIME_FORMATS)}])"


def transcode_to_utf8(file: Path, directory: Path) -> Path:
    """Copy a GB18030 file to ``directory`` in UTF-8, in chunks; invalid bytes become U+FFFD."""
    directory.mkdir(parents=True, exist_ok=True)
    decoder = codecs.getincrementaldecoder("gb18030")(errors="replace")
    with (
        open(file, "rb") as source,
        tempfile.NamedTemporaryFile("w", suffix=".csv", dir=directory, encoding="utf-8", delete=False) as target,
    ):
        while chunk := source.read(CHUNK_BYTES):
            target.write(decoder.decode(chunk))
        target.write(decoder.decode(b"", final=True))
    return Path(target.name)
