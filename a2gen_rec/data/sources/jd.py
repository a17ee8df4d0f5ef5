"""JD micro-behaviors: timed actions of shoppers on product pages (Gu et al., WSDM 2020).

One session per line with events ``sku+behavior+category+interval+dwell`` separated by spaces; ``interval`` is in
seconds until the next event. An impression is a run of consecutive events on one product. Behaviors 1-5 are entry
channels of the page (context ``channel``), 6-10 are actions on it. Sessions have no user identifier. Each session is
therefore one user, and there are no user features.
"""

import re
from pathlib import Path

import duckdb

from a2gen_rec.data.csv_errors import check_complete, compression_of
from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sources.files import find_files
from a2gen_rec.data.sql import quote_literal, quote_path
from a2gen_rec.errors import DataError

CHANNELS = {1: "home", 2: "list", 3: "sale", 4: "cart_page", 5: "search"}
ACTIONS = {6: "comments", 7: "specification", 8: "page_bottom", 9: "cart", 10: "order"}
EVENT_FIELDS = ("sku", "behavior", "category", "interval", "dwell")
# At most nine digits of seconds prevent overflow of sums within a session.
FIELD_PATTERNS = (r"\d+", r"[1-9]|10", r"\d+", r"\d{1,9}", r"\d{1,9}")


class JD:
    """The sample's file, or a directory that contains only this file.

    Raises:
        DataError: there is not exactly one file, or (in :meth:`impressions`) an event is invalid.
    """

    def __init__(self, raw: str) -> None:
        files = [Path(raw)] if Path(raw).is_file() else find_files(Path(raw), "[!.]*")
        if len(files) != 1:
            raise DataError(f"has {len(files)} files; pass the path of one file", file=raw)
        self.file = files[0]

    def describe(self) -> SourceInfo:
        return SourceInfo(
            name="jd",
            actions=tuple(ACTIONS.values()),
            features=(
                FeatureSpec("item_id", "item", min_count=2),
                FeatureSpec("category", "item"),
                FeatureSpec("channel", "context"),
                FeatureSpec("position", "context", "buckets", size=16),
            ),
            split=SplitRule(method="last", valid_fraction=0.1, test_fraction=0.1),
            has_calendar_time=False,
            licence="research use only",
            citation="Gu et al., Hierarchical User Profiling for E-commerce Recommender Systems, WSDM 2020",
            url="https://github.com/guyulongcs/WSDM2020_HUP",
        )

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        # Line numbers need the file's order. With CRLF, DuckDB also reads LF and counts empty lines of both once.
        connection.execute("SET preserve_insertion_order = true")
        check_complete(self.file)
        with open(self.file, "rb") as stream:
            compression = compression_of(stream.read(4))
        lines = f"""(
            SELECT row_number() OVER () AS session, trim(line) AS line FROM read_csv(
                {quote_path(self.file)}, hive_partitioning = false, columns = {{'line': 'VARCHAR'}},
                header = false, delim = '\x1f', quote = '', escape = '', comment = '',
                auto_detect = false, strict_mode = false, compression = {quote_literal(compression)},
                new_line = '\\r\\n', max_line_size = 16777216))"""
        tokens = f"""(
            SELECT session, unnest(events) AS token, generate_subscripts(events, 1) AS event_index
            FROM (SELECT session, regexp_split_to_array(line, '\\s+') AS events FROM {lines} WHERE line <> ''))"""
        self.check(connection, tokens)
        channel = " ".join(f"WHEN {code} THEN '{name}'" for code, name in CHANNELS.items())
        actions = ", ".join(
            f"min(start_s) FILTER (behavior = {code}) - min(start_s) AS at_{name}" for code, name in ACTIONS.items()
        )
        return f"""
            WITH events AS (
                SELECT session, event_index, part[1] AS sku, part[2]::INT AS behavior, part[3] AS category,
                    part[4]::BIGINT AS interval_s, part[5]::BIGINT AS dwell_s
                FROM (SELECT session, event_index, string_split(token, '+') AS part FROM {tokens})),
            timed AS (
                SELECT *, sum(interval_s) OVER session_order - interval_s AS start_s,
                    sku IS DISTINCT FROM lag(sku) OVER session_order AS new_run
                FROM events WINDOW session_order AS (PARTITION BY session ORDER BY event_index)),
            runs AS (
                SELECT *, sum(new_run::INT) OVER (PARTITION BY session ORDER BY event_index) AS run FROM timed)
            SELECT session::VARCHAR AS user_id, any_value(sku) AS item_id,
                (min(start_s) * 1000 + run)::BIGINT AS ts_ms, max(dwell_s)::DOUBLE AS dwell_s, {actions},
                arg_min(category, event_index) AS category,
                CASE arg_min(behavior, event_index) {channel} END AS channel,
                run::DOUBLE AS position, NULL AS drop_reason
            FROM runs GROUP BY session, run"""

    def check(self, connection: duckdb.DuckDBPyConnection, tokens: str) -> None:
        """Check all events.

        Raises:
            DataError: for the first invalid event, with line and field.
        """
        event_pattern = r"\+".join(f"({pattern})" for pattern in FIELD_PATTERNS)
        invalid = connection.execute(
            f"""SELECT session, event_index, token FROM {tokens}
            WHERE NOT regexp_full_match(token, {quote_literal(event_pattern)})
            ORDER BY session, event_index LIMIT 1"""
        ).fetchall()
        for session, event_index, token in invalid:
            parts = token.split("+")
            if len(parts) != len(EVENT_FIELDS):
                reason = f"event {event_index} {token!r} has {len(parts)} fields, expected {len(EVENT_FIELDS)}"
                raise DataError(reason, file=self.file, row=session, field="event")
            # DuckDB's \d matches ASCII digits only.
            matched = zip(EVENT_FIELDS, parts, FIELD_PATTERNS, strict=True)
            name, value, _ = next(x for x in matched if not re.fullmatch(x[2], x[1], re.ASCII))
            raise DataError(f"event {event_index} has invalid value {value!r}", file=self.file, row=session, field=name)
