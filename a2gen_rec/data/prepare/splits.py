"""Split of impressions into training, validation and test: by time, or by each user's last impressions [ours].

Both rules follow time within a user. A user's impressions are therefore in the order train, valid, test.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import duckdb

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare.statistics import SplitCounts
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sql import fetch_one, order_statistics
from a2gen_rec.data.time_zone import MAX_TIMESTAMP_MS, MIN_CALENDAR_MS
from a2gen_rec.errors import ConfigError, DataError

TRAIN_ONLY = SplitRule("train", valid_fraction=0.0, test_fraction=0.0)


@dataclass(frozen=True)
class TimeBoundaries:
    """Start times of the validation and test splits in milliseconds."""

    valid_ms: int
    test_ms: int

    def split_sql(self) -> str:
        """Return the SQL of the split's index in ``schema.SPLITS``."""
        return f"(CASE WHEN ts_ms >= {self.test_ms} THEN 2 WHEN ts_ms >= {self.valid_ms} THEN 1 ELSE 0 END)::TINYINT"


def resolve_split_rule(info: SourceInfo, config: PrepareConfig, is_increment: bool = False) -> SplitRule:
    """Return the source's rule with the overrides of ``config``; a boundary selects the method ``time``.

    Without overrides, all impressions of an increment are training: a model is evaluated on them before it learns them.

    Raises:
        ConfigError: ``train_only`` is set with another rule, only one boundary is set, the fractions are out of range,
            or a boundary is a date but the log has no calendar time.
    """
    rule = info.split
    if config.train_only:
        for name in ("valid_start", "test_start", "valid_fraction", "test_fraction"):
            if getattr(config, name):
                raise ConfigError(f"train_only and {name} exclude each other")
        return TRAIN_ONLY
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
    elif is_increment:
        return TRAIN_ONLY
    if bool(rule.valid_start) != bool(rule.test_start):
        raise ConfigError("valid_start and test_start must be set together")
    if rule.valid_fraction < 0 or rule.test_fraction < 0 or rule.valid_fraction + rule.test_fraction >= 1:
        raise ConfigError(
            f"valid_fraction {rule.valid_fraction} and test_fraction {rule.test_fraction} must be at least 0 "
            "and sum to less than 1"
        )
    for name, value in (("valid_start", rule.valid_start), ("test_start", rule.test_start)):
        if value and not value.isdigit() and not info.has_calendar_time:
            raise ConfigError(f"{name} {value!r} is a date, but {info.name} has no calendar time")
        if value:
            boundary_ms(name, value, info, end_ms=0)
    return rule


def boundary_ms(name: str, value: str, info: SourceInfo, end_ms: int) -> int:
    """Return a boundary in epoch milliseconds.

    Args:
        name: name of the setting, for errors.
        value: ISO datetime (local unless it contains a time zone; 20240520 is a date), milliseconds, or ``-Nd``: the
            start of the N-th last local day of the log.
        info: metadata of the log: its time zone, and whether it has calendar time.
        end_ms: start of the log's last impression.

    Raises:
        ConfigError: the value has none of these formats.
    """
    if re.fullmatch(r"\d+", value) and not (info.has_calendar_time and _is_compact_date(value)):
        if info.has_calendar_time and int(value) < MIN_CALENDAR_MS:
            reason = "is a number of milliseconds before the year 2000; write a date such as 2024-05-20"
            raise ConfigError(f"{name} {value!r} {reason}")
        if info.has_calendar_time and int(value) >= MAX_TIMESTAMP_MS:
            raise ConfigError(f"{name} {value!r} is after the year 9999; expected milliseconds, not microseconds")
        return int(value)
    if last_days := re.fullmatch(r"-([1-9]\d{0,5})d", value):
        return info.time_zone.start_of_day_ms(end_ms, int(last_days[1]) - 1)
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise ConfigError(f"{name} {value!r} is not an ISO datetime, a millisecond timestamp or -Nd") from None
    return info.time_zone.to_utc_ms(time)


def time_range_sql(relation: str, info: SourceInfo, config: PrepareConfig) -> str:
    """Return the SQL of the rows of a source from ``config.start`` to ``config.end``; rows without a time remain.

    Raises:
        ConfigError: a limit is invalid, or the log has no calendar time.
    """
    conditions = []
    for name, operator in (("start", ">="), ("end", "<")):
        if value := getattr(config, name):
            if not info.has_calendar_time:
                raise ConfigError(f"{name} {value!r}, but {info.name} has no calendar time")
            if value.startswith("-"):
                raise ConfigError(f"{name} {value!r} is not an ISO datetime or a millisecond timestamp")
            conditions.append(f"(ts_ms {operator} {boundary_ms(name, value, info, end_ms=0)}) IS NOT FALSE")
    return f"SELECT * FROM ({relation}) WHERE {' AND '.join(conditions)}" if conditions else relation


def _is_compact_date(value: str) -> bool:
    """Return whether digits are a date such as 20240520 rather than milliseconds, which would be hours after 1970."""
    return len(value) == 8 and value[:2] in ("19", "20") and "01" <= value[4:6] <= "12" and "01" <= value[6:] <= "31"


def time_boundaries(
    connection: duckdb.DuckDBPyConnection, relation: str, rule: SplitRule, info: SourceInfo
) -> TimeBoundaries:
    """Return the boundaries of a rule by time: as set, or the quantiles of ``ts_ms`` for its fractions.

    Raises:
        ConfigError: validation starts after test.
        DataError: no training impression is left.
    """
    count, first_ms, last_ms = fetch_one(connection, f"SELECT count(*), min(ts_ms), max(ts_ms) FROM {relation}")

    def boundary(name: str, value: str) -> int:
        return boundary_ms(name, value, info, last_ms)

    if rule.valid_start:
        valid_ms = boundary("valid_start", rule.valid_start)
        test_ms = boundary("test_start", rule.test_start)
    else:
        in_test = round(rule.test_fraction * count)
        in_valid = round(rule.valid_fraction * count)
        # A rank of count + 1 means an empty split.
        ranks = [rank for rank in (count - in_test - in_valid + 1, count - in_test + 1) if rank <= count]
        values = order_statistics(connection, relation, "ts_ms", ranks) if ranks else []
        values += [last_ms + 1] * (2 - len(values))
        valid_ms, test_ms = int(values[0]), int(values[1])
    if valid_ms > test_ms:
        raise ConfigError(f"valid_start ({valid_ms} ms) must not be after test_start ({test_ms} ms)")
    if first_ms >= valid_ms:
        reason = f"no training impressions before {valid_ms} ms, the start of validation: they start from {first_ms} ms"
        raise DataError(f"{reason} to {last_ms} ms; set --valid-start and --test-start", file=info.name, field="ts_ms")
    return TimeBoundaries(valid_ms, test_ms)


def check_not_empty(
    rule: SplitRule, info: SourceInfo, counts: Mapping[str, SplitCounts], boundaries: TimeBoundaries | None
) -> None:
    """Check that every split has impressions, unless its fraction is 0.

    Args:
        rule: rule of the splits.
        info: metadata of the log.
        counts: split -> counts of its impressions.
        boundaries: boundaries of a rule by time; None for each user's last impressions.

    Raises:
        DataError: a split is empty; with the reason and the settings to change.
    """
    fractions = {"train": 1.0, "valid": rule.valid_fraction, "test": rule.test_fraction}
    empty = [name for name in counts if not counts[name].targets and (rule.valid_start or fractions[name])]
    if not empty:
        return
    if boundaries is None:
        reason = "no user has the 3 impressions that a split of each user's last ones needs; set"
    else:
        first_ms = min(split.first_ms for split in counts.values() if split.first_ms is not None)
        last_ms = max(split.last_ms for split in counts.values() if split.last_ms is not None)
        first, last, valid, test = (
            datetime.fromtimestamp(ms / 1000, UTC).isoformat() if info.has_calendar_time else f"{ms} ms"
            for ms in (first_ms, last_ms, boundaries.valid_ms, boundaries.test_ms)
        )
        reason = f"impressions start from {first} to {last}, validation begins at {valid}, test at {test}; "
        reason += "set other" if rule.valid_start else "there are too few of them, or too many at one time; set"
    raise DataError(
        f"no impressions in split {' and '.join(empty)}: {reason} --valid-start and --test-start", file=info.name
    )


def split_by_user_tail(relation: str, rule: SplitRule) -> str:
    """Return the SQL relation with a ``split`` column: each user's last impressions are test, the ones before valid.

    A user with ``n`` impressions has ``max(1, round(fraction · n))`` test impressions and likewise validation
    impressions. Users with fewer than three impressions have training impressions only.
    """

    def count(fraction: float) -> str:
        return f'greatest(1, floor({fraction!r} * "impressions of user" + 0.5))' if fraction else "0"

    return f"""(
        SELECT * EXCLUDE ("position in user", "impressions of user"), (CASE
            WHEN "impressions of user" < 3 OR "position in user" <= "impressions of user"
                - {count(rule.test_fraction)} - {count(rule.valid_fraction)} THEN 0
            WHEN "position in user" <= "impressions of user" - {count(rule.test_fraction)} THEN 1
            ELSE 2 END)::TINYINT AS split
        FROM (
            SELECT *, row_number() OVER (PARTITION BY user_id ORDER BY ts_ms, item_id) AS "position in user",
                count(*) OVER (PARTITION BY user_id) AS "impressions of user"
            FROM {relation}))"""
