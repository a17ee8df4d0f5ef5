"""What a source of raw logs offers to ``prepare``: one SQL relation in standard columns, and its own facts.

Columns of the relation, one row per impression (types are DuckDB's)::

    user_id   VARCHAR   raw user identifier
    item_id   VARCHAR   raw item identifier
    ts_ms     BIGINT    begin of the impression
    dwell_s   DOUBLE    watch time; NaN when not recorded
    at_<action>     DOUBLE   NULL: did not happen; NaN: happened at an unknown time; else seconds since begin
    label_<label>   DOUBLE   0, 1, or NULL when unknown
    <feature>       VARCHAR for vocabulary and hash features, DOUBLE for buckets; NULL when missing
    oracle_<name>   DOUBLE   true probability of an action or label (simulated logs only)
    drop_reason   VARCHAR   why the row must be dropped, NULL for a good row

Features ``user_id`` and ``item_id`` reuse the identifier columns. A source sees its raw files and DuckDB only:
splits, vocabularies and windows are made by ``prepare``, the same for every log.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import duckdb

from a2gen_rec.data.schema import FeatureSpec


@dataclass(frozen=True)
class SplitRule:
    """How impressions are divided into training, validation and test.

    Attributes:
        by: ``time`` cuts the calendar for all users; ``last`` takes each user's last impressions.
        valid_start, test_start: boundaries for ``time`` (ISO in the log's time zone, milliseconds, or ``-2d``:
            the begin of the log's last day but one); empty: by share.
        valid_fraction, test_fraction: shares of impressions (``time``) or of each user's impressions (``last``).
    """

    method: Literal["time", "last"] = "time"
    valid_start: str = ""
    test_start: str = ""
    valid_fraction: float = 0.1
    test_fraction: float = 0.1


@dataclass(frozen=True)
class SourceInfo:
    """What does not depend on the rows.

    Attributes:
        actions: the log's own actions in vocabulary order, without ``start`` and ``exit``.
        labels: impression labels that are not acts.
        duration: feature of kind ``buckets`` that holds the video's length in seconds; empty when there is none.
        negative: those of the actions that are explicit negative feedback.
        calendar: whether ``ts_ms`` is wall-clock time; adds the context features hour_of_day and day_of_week.
        elapsed: whether differences of ``ts_ms`` are elapsed time, not order alone; adds the session features.
        utc_offset_hours: the log's time zone, for those features and for split boundaries.
    """

    name: str
    actions: tuple[str, ...]
    features: tuple[FeatureSpec, ...]
    labels: tuple[str, ...] = ()
    duration_feature: str = ""
    negative_actions: tuple[str, ...] = ()
    split: SplitRule = field(default_factory=SplitRule)
    has_calendar_time: bool = True
    has_elapsed_time: bool = True
    utc_offset_hours: float = 0.0
    oracle: tuple[str, ...] = ()
    licence: str = ""
    citation: str = ""
    url: str = ""


class Source(Protocol):
    """One kind of raw log, at one place."""

    def describe(self) -> SourceInfo:
        """What the log offers. May look at file headers; raises DataError when files or columns are missing."""
        ...

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        """SQL of the relation above; may create temporary views and tables on ``connection`` first.

        Raises:
            DataError: a file cannot be parsed, or a value breaks the format, naming file, row and field.
        """
        ...
