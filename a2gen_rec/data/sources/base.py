"""Interface between sources of raw logs and ``prepare``: one SQL relation in standard columns, and source metadata.

Columns of the relation, one row per impression (types are DuckDB's)::

    user_id   VARCHAR   raw user identifier
    item_id   VARCHAR   raw item identifier
    ts_ms     BIGINT    start of the impression
    dwell_s   DOUBLE    watch time; NaN if not recorded
    at_<action>     DOUBLE   NULL: did not occur; NaN: occurred at an unknown time; else seconds since the start
    label_<label>   DOUBLE   0, 1, or NULL if unknown
    <feature>       VARCHAR for vocabulary and hash features, DOUBLE for buckets and numbers; NULL if missing;
                             for multi-valued features VALUES_TYPE of ``bag_sql.py``
    oracle_<name>   DOUBLE   true probability of an action or label (simulated logs only)
    drop_reason     VARCHAR  reason why the row is unusable; NULL for a usable row

The features ``user_id`` and ``item_id`` use the identifier columns. A source depends only on its raw files and DuckDB.
``prepare`` creates splits, vocabularies and windows in the same way for every log.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import duckdb

from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.time_zone import UTC_ZONE, TimeZone


@dataclass(frozen=True)
class SplitRule:
    """Rule that divides impressions into training, validation and test.

    Attributes:
        method: ``time`` splits all users at two boundaries; ``last`` takes each user's last impressions; ``train``
            leaves all impressions in training.
        valid_start: start of validation for ``time``: ISO datetime in the log's time zone, milliseconds, or ``-Nd``
            (start of the log's N-th last day); empty to split by fraction.
        test_start: start of test for ``time``, in the same formats.
        valid_fraction: fraction of all impressions (``time``) or of each user's impressions (``last``).
        test_fraction: fraction of all impressions (``time``) or of each user's impressions (``last``).
    """

    method: Literal["time", "last", "train"] = "time"
    valid_start: str = ""
    test_start: str = ""
    valid_fraction: float = 0.1
    test_fraction: float = 0.1


@dataclass(frozen=True)
class VectorSource:
    """Vectors of items in a source.

    Attributes:
        name: name of the vector.
        width: number of elements.
        relation: function that returns the SQL of ``item_id`` (VARCHAR) and ``vector`` (a list of numbers), each item
            once, also items without impressions. Raises DataError like :meth:`Source.impressions`.
    """

    name: str
    width: int
    relation: Callable[[duckdb.DuckDBPyConnection], str]


@dataclass(frozen=True)
class SourceInfo:
    """Metadata of a source, independent of its rows.

    Attributes:
        name: name of the source.
        actions: actions in vocabulary order, without ``start`` and ``exit``.
        features: features and their encodings.
        labels: impression labels that are not actions.
        duration_feature: feature of kind ``buckets`` that contains the video's duration in seconds; empty for none.
        negative_actions: actions that are explicit negative feedback.
        split: default split rule.
        has_calendar_time: whether ``ts_ms`` is wall-clock time; adds the context features ``hour_of_day`` and
            ``day_of_week``.
        has_elapsed_time: whether differences of ``ts_ms`` are elapsed time, not only order; adds session features.
        time_zone: time zone of the log, for calendar features and split boundaries.
        oracle: actions and labels with a true probability.
        vectors: vectors of items.
        licence: licence of the data.
        citation: publication to cite.
        url: home page of the data.
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
    time_zone: TimeZone = UTC_ZONE
    oracle: tuple[str, ...] = ()
    vectors: tuple[VectorSource, ...] = ()
    licence: str = ""
    citation: str = ""
    url: str = ""


class Source(Protocol):
    """A raw log of one kind at one path."""

    def describe(self) -> SourceInfo:
        """Return the metadata of the log. May read file headers.

        Raises:
            DataError: a file or column is missing.
        """
        ...

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        """Return the SQL of the relation above. May create temporary views and tables on ``connection``.

        Raises:
            DataError: a file cannot be parsed or a value is invalid; with file, row and field.
        """
        ...
