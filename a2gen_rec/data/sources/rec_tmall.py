"""Rec-Tmall: clicks, collects, carts and purchases on Tmall (Tianchi dataset 140281).

A click starts an impression, an idle gap of half an hour ends it (``events.py``). The log does not record when a user
leaves a product page: ``exit`` has no time.
"""

import codecs
import tempfile
from collections.abc import Mapping
from pathlib import Path

import duckdb
import pyarrow as pa

from a2gen_rec.data.csv_errors import CsvDialect, open_bytes
from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources import events
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sources.files import RawFiles, find_files
from a2gen_rec.data.sources.times import checked_time
from a2gen_rec.data.sources.values import Check, Column, Value, identifier, missing, text
from a2gen_rec.data.sql import fetch_one, quote_literal, translate_errors
from a2gen_rec.data.time_zone import TimeZone
from a2gen_rec.errors import DataError, first_line

SESSIONIZATION_RULES = events.SessionizationRules(
    open_event="click",
    actions={"collect": "collect", "cart": "cart", "alipay": "alipay"},
    idle_gap_s=30 * 60,
)
LOG_COLUMNS = ("item_id", "user_id", "action", "vtime")
PRODUCT_COLUMNS = {"category": "category", "brand": "brand_id", "seller": "seller_id"}
TIME_FORMATS = ("%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y-%m-%d %H:%M:%S")
ZONE = TimeZone(utc_offset_hours=8)
CHUNK_BYTES = 1 << 24


class RecTmall:
    """The log's file, or a directory with ``*rec_tmall_log*`` files and optional ``*rec_tmall_product*`` files.

    Raises:
        DataError: a file or column is missing, or (in :meth:`impressions`) an action or time is invalid.
    """

    def __init__(self, raw: str) -> None:
        path = Path(raw)
        self.logs = RawFiles([path] if path.is_file() else find_files(path, "*rec_tmall_log*"), LOG_COLUMNS)
        self.products = [] if path.is_file() else sorted(path.glob("*rec_tmall_product*"))

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
            time_zone=ZONE,
            licence="terms of Tianchi dataset 140281",
            citation="Alibaba, Rec-Tmall, Tianchi dataset 140281",
            url="https://tianchi.aliyun.com/dataset/140281",
        )

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        log = f"({self.logs.relation(connection, _log_values)})"
        relation = events.impressions_from_events(log, SESSIONIZATION_RULES, [])
        if not self.products:
            return relation
        directory = Path(fetch_one(connection, "SELECT current_setting('temp_directory')")[0])
        copies = {str(transcode_to_utf8(file, directory)): str(file) for file in self.products}
        try:
            # Titles contain quotes.
            products = RawFiles(
                list(map(Path, copies)), ("item_id", *PRODUCT_COLUMNS.values()), CsvDialect(strict=False)
            )
            product_columns = "".join(
                f", any_value(nullif({column}, 'null') ORDER BY {column}) AS {name}"
                for name, column in PRODUCT_COLUMNS.items()
            )
            with translate_errors(self.products[0]):
                # A table: errors of the copies occur here, where the names of the files are known.
                connection.execute(
                    f"""CREATE OR REPLACE TEMP TABLE products AS SELECT ltrim(item_id, 'i') AS id{product_columns}
                    FROM ({products.relation(connection, _product_values)}) GROUP BY ALL"""
                )
        except DataError as error:
            text = str(error)
            for copy, file in copies.items():
                text = text.replace(copy, file)
            raise DataError(text) from error
        finally:
            for copy in copies:
                Path(copy).unlink()
        return f"""SELECT impressions.*, products.* EXCLUDE (id) FROM ({relation}) AS impressions
            LEFT JOIN products ON ltrim(impressions.item_id, 'i') = products.id"""


def _log_values(columns: Mapping[str, Column]) -> dict[str, Value]:
    action, time = text([columns["action"]]), columns["vtime"]
    known = ", ".join(
        quote_literal(value) for value in (SESSIONIZATION_RULES.open_event, *SESSIONIZATION_RULES.actions.values())
    )
    is_unknown = Check("action", f"{action.sql} NOT IN ({known})", action.sql, "is an unknown action")
    parsed = f"try_strptime({time.plain_sql}, [{', '.join(map(quote_literal, TIME_FORMATS))}])"
    return {
        "user_id": identifier([columns["user_id"]]),
        "item_id": identifier([columns["item_id"]]),
        "action": Value(action.sql, (*action.checks, missing([columns["action"]], action.sql), is_unknown)),
        "t_ms": checked_time([time], [ZONE.utc_ms_sql(parsed)], "is not a time such as 2014/9/18 15:03"),
    }


def _product_values(columns: Mapping[str, Column]) -> dict[str, Value]:
    return {name: text([columns[name]]) for name in ("item_id", *PRODUCT_COLUMNS.values())}


def transcode_to_utf8(file: Path, directory: Path) -> Path:
    """Copy a GB18030 file, possibly compressed, to ``directory`` in UTF-8; invalid bytes become U+FFFD.

    Raises:
        DataError: a compressed file is incomplete.
    """
    directory.mkdir(parents=True, exist_ok=True)
    decoder = codecs.getincrementaldecoder("gb18030")(errors="replace")
    copy = Path(tempfile.mkdtemp(dir=directory), file.name)
    try:
        with open_bytes(file) as source, open(copy, "w", encoding="utf-8", newline="") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(decoder.decode(chunk))
            target.write(decoder.decode(b"", final=True))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot be read ({first_line(error)})", file=file) from error
    return copy
