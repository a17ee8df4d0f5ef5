"""Which impressions train, validate and test: by the calendar for all users, or each user's last ones [ours].

Both rules follow time within a user, so a user's impressions run train, valid, test without overlap.
"""

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import duckdb

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sql import fetch_one, order_statistics
from a2gen_rec.errors import ConfigError, DataError

DAY_MS = 86_400_000


@dataclass(frozen=True)
class TimeBoundaries:
    """Begin (ms) of validation and of test."""

    valid_ms: int
    test_ms: int

    def split_sql(self) -> str:
        """SQL of the split's index in ``schema.SPLITS``."""
        return f"(CASE WHEN ts_ms >= {self.test_ms} THEN 2 WHEN ts_ms >= {self.valid_ms} THEN 1 ELSE 0 END)::TINYINT"


def resolve_split_rule(info: SourceInfo, config: PrepareConfig) -> SplitRule:
    """The source's rule with what the user's settings replace; a boundary given makes any rule one by time.

    Raises:
        ConfigError: one boundary without the other, shares out of range, or a date for a log without calendar.
    """
    rule = info.split
    if config.valid_start or config.test_start:
        rule = replace(rule, method="time", valid_start=config.valid_start, test_start=config.test_start)
    elif config.valid_fraction or config.test_fraction:
        rule = replace(
            rule,
            valid_start="",
            test_start="",
            valid_fraction=config.valid_fraction or rule.valid_fraction,
            test_fraction=config.test_fraction or rule.test_fraction,
        )
    if bool(rule.valid_start) != bool(rule.test_start):
        raise ConfigError("valid_start and test_start must be given together")
    if rule.valid_fraction < 0 or rule.test_fraction < 0 or rule.valid_fraction + rule.test_fraction >= 1:
        raise ConfigError(
            f"valid_fraction {rule.valid_fraction} and test_fraction {rule.test_fraction} must be shares below 1 in sum"
        )
    for name, value in (("valid_start", rule.valid_start), ("test_start", rule.test_start)):
        if value and not value.isdigit() and not info.has_calendar_time:
            raise ConfigError(f"{name} {value!r} is a date, but {info.name} has no calendar time")
        if value:
            boundary_ms(name, value, info.utc_offset_hours, end_ms=0)
    return rule


def boundary_ms(name: str, value: str, utc_offset_hours: float, end_ms: int) -> int:
    """A boundary as epoch milliseconds.

    Args:
        value: ISO date-time (local unless it names a zone), milliseconds, or ``-Nd``: the begin of the N-th last
            local day of a log whose last impression begins at ``end_ms``.

    Raises:
        ConfigError: none of these.
    """
    offset_ms = round(utc_offset_hours * 3_600_000)
    if re.fullmatch(r"\d+", value):
        return int(value)
    if last_days := re.fullmatch(r"-(\d+)d", value):
        midnight = (end_ms + offset_ms) // DAY_MS * DAY_MS - offset_ms
        return midnight - (int(last_days[1]) - 1) * DAY_MS
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ConfigError(f"{name} {value!r} is no ISO date-time, number of milliseconds, or -Nd") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC) - timedelta(milliseconds=offset_ms)
    return round(moment.timestamp() * 1000)


def time_boundaries(
    connection: duckdb.DuckDBPyConnection, relation: str, rule: SplitRule, utc_offset_hours: float
) -> TimeBoundaries:
    """Boundaries of a rule by time: as given, or the quantiles of ``ts_ms`` that its shares name.

    Raises:
        ConfigError: validation would not begin before test.
        DataError: nothing would be left to train on.
    """
    count, first_ms, last_ms = fetch_one(connection, f"SELECT count(*), min(ts_ms), max(ts_ms) FROM {relation}")
    if rule.valid_start:
        valid_ms = boundary_ms("valid_start", rule.valid_start, utc_offset_hours, last_ms)
        test_ms = boundary_ms("test_start", rule.test_start, utc_offset_hours, last_ms)
    else:
        in_test = round(rule.test_fraction * count)
        in_valid = round(rule.valid_fraction * count)
        # One place past the end stands for a split that takes nothing.
        places = [count - in_test - in_valid + 1, count - in_test + 1]
        inside = [place for place in places if place <= count]
        values = order_statistics(connection, relation, "ts_ms", inside) if inside else []
        values += [last_ms + 1] * (2 - len(values))
        valid_ms, test_ms = int(values[0]), int(values[1])
    if valid_ms > test_ms:
        raise ConfigError(f"valid_start ({valid_ms} ms) must not be after test_start ({test_ms} ms)")
    if first_ms >= valid_ms:
        raise DataError(f"no impression before {valid_ms} ms is left to train on", field="ts_ms")
    return TimeBoundaries(valid_ms, test_ms)


def split_by_user_tail(relation: str, rule: SplitRule) -> str:
    """SQL relation with a ``split`` column: each user's last impressions test, those before them validate.

    A user with ``n`` impressions gives ``max(1, round(share · n))`` to test and likewise to validation; users
    with fewer than three only train.
    """

    def taken(share: float) -> str:
        return f"greatest(1, floor({share!r} * total + 0.5))" if share else "0"

    return f"""(
        SELECT * EXCLUDE (place, total), (CASE
            WHEN total < 3 OR place <= total - {taken(rule.test_fraction)} - {taken(rule.valid_fraction)} THEN 0
            WHEN place <= total - {taken(rule.test_fraction)} THEN 1
            ELSE 2 END)::TINYINT AS split
        FROM (
            SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY ts_ms, item_id) AS place,
                count(*) OVER (PARTITION BY user_id) AS total
            FROM {relation}))"""
