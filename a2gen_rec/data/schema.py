"""The dataset format: the files that ``prepare`` writes and the loader reads.

A prepared dataset is a directory::

    dataset.yaml                 dataset card (``card.py``)
    train/ valid/ test/*.parquet one row per user window
    items.parquet                per item: raw ``item`` (string), item feature rows and numbers, raw duration
    users.parquet                per user: raw ``user`` (string), ``user_key``, user feature rows and numbers
    item_statistics.parquet      training impressions and positives per ``item_id`` row
    vectors/NAME.npy             per item, in the order of items.parquet: vector (float16), NaN if missing
    vocabulary/FEATURE.parquet   raw ``value`` (string) -> table ``row`` (int64), for vocabulary features; further
                                 columns: ``features/admission.py``
    carry/                       what the next increment needs: ``prepare/carry.py``

A window contains impressions of one user in time order: history first, then targets. Columns of a window::

    user             string          raw user identifier
    user_key         int64           hash of the raw identifier, for grouping and partitioning
    <user feature>   int64           row in the feature's table
    <item feature>   list<int64>     one per impression; ``item_id`` is always present
    <context, session or outcome feature> list<int64>    one per impression
    <user number>    float           standardized value, NaN if missing
    <multi-valued feature> list<int64> or list<list<int64>>  rows, at least one, and "weights of <feature>" if weighted
    <item or context number> list<float> one standardized value per impression, NaN if missing
    ts_ms            list<int64>     start of the impression
    dwell_s          list<float>     watch time, NaN if not recorded
    action           list<list<int8>>    codes into ``actions``: start first, exit last
    action_offset_s  list<list<float>>   seconds since the start of the impression, NaN if not recorded
    label_<name>     list<float>     0, 1, or NaN if unknown
    objective_<name> list<float>     0, 1, or NaN if unknown
    oracle_<action>  list<float>     true probability, simulated data only
    first_target     int32           index of the first target; earlier impressions are history only
    item_index       list<int64>     row of items.parquet of each impression; absent without vectors
    statistics       list<float16>   statistics of the targets, row by row, in the card's order; absent without any

Row 0 of every table is "unknown": values that are missing, rare or absent in the training data.

Session features are known at the start of an impression, outcome features only at its end. The outcome features of a
target are therefore never model inputs. ``prepare`` computes the rows and values of both (``features/sessions.py``,
``features/feedback.py``).
"""

from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.data.inputs import Number

START, EXIT = "start", "exit"
SPLITS = ("train", "valid", "test")
FORMAT_VERSION = 9
CARD_FILE, VOCABULARY_DIR = "dataset.yaml", "vocabulary"
USER_ID, ITEM_ID = "user_id", "item_id"

SESSION_POSITION, SESSION_GAP, PREVIOUS_FEEDBACK = "session_position", "session_gap", "previous_feedback"
FEEDBACK, WATCH_RATIO = "feedback", "watch_ratio"
RAW_DURATION_COLUMN = "raw_duration_s"
"""Column of ``items.parquet``: raw duration of the video, if the feedback levels depend on it."""
ITEM_INDEX = "item_index"
"""Column of windows with the rows of ``items.parquet``."""
STATISTICS_COLUMN = "statistics"
"""Column of windows and ``items.parquet`` with the statistics of the card."""
OBJECTIVES = ("glance", "effective", "negative")
WATCH_TIME = "watch_time"
"""Predicted watch time of a log that records watch times, in addition to the objectives."""
FEEDBACK_LEVELS = ("unknown", "negative", "glance", "partial", "effective", "complete")
"""Feedback levels of impressions in code order: the codes are rows of the tables ``feedback`` and
``previous_feedback``."""
UNKNOWN, NEGATIVE, GLANCE, PARTIAL, EFFECTIVE, COMPLETE = range(len(FEEDBACK_LEVELS))

FeatureLevel = Literal["user", "item", "context", "session", "outcome"]
FeatureKind = Literal["vocabulary", "hash", "buckets", "code"]
InputKind = FeatureKind | Literal["number"]
NUMERIC_KINDS = ("buckets", "number")
"""Kinds of inputs whose raw values are numbers."""
StatisticKind = Literal["count", "rate", "mean"]


@dataclass(frozen=True)
class Feature:
    """A categorical input and the mapping of its raw values to table rows.

    Attributes:
        name: column name.
        level: entity that the feature describes.
        kind: mapping of values to rows. ``code``: values are rows, such as feedback levels.
        cardinality: number of table rows, including row 0 ("unknown").
        boundaries: for ``buckets``, sorted inner edges; row ``1 + number of edges <= value``.
        multi_valued: whether an entity has a list of values.
        weighted: whether the values of a list have weights.
        mean_values: mean number of values of training impressions.
    """

    name: str
    level: FeatureLevel
    kind: FeatureKind
    cardinality: int
    boundaries: list[float] = field(default_factory=list)
    multi_valued: bool = False
    weighted: bool = False
    mean_values: float = 1.0


Input = Feature | Number


@dataclass(frozen=True)
class Statistic:
    """A number that summarizes earlier impressions with the same value of an item feature.

    Attributes:
        feature: item feature.
        outcome: ``impressions``; an action, label or objective; ``watch_time``; or ``time_`` + action.
        kind: ``count`` is log1p of the number of impressions, ``rate`` the log ratio of the smoothed share of positives
            to the training share, ``mean`` the difference of smoothed mean log1p seconds from the training mean. A
            value without earlier impressions has 0.
        prior: training share of positives, or training mean of log1p seconds; 0 for ``count``.
    """

    feature: str
    outcome: str
    kind: StatisticKind
    prior: float


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split.

    Attributes:
        windows: number of windows.
        targets: number of targets.
        first_ms: start of the first target; None without targets.
        last_ms: start of the last target; None without targets.
        positives: targets per positive action, label and objective.
        feedback: targets per feedback level; empty without feedback levels.
    """

    windows: int
    targets: int
    first_ms: int | None
    last_ms: int | None
    positives: dict[str, int]
    feedback: dict[str, int]


@dataclass(frozen=True)
class FeedbackRule:
    """The rule that assigns feedback levels and objectives to impressions [ours].

    The first matching condition decides: *negative*, a negative action occurred; *unknown*, no watch time;
    *complete*, watch time of at least the video's duration; *glance*, watch time below ``glance_s``; *effective*,
    watch time of at least the median of the duration bucket; else *partial*. The objectives ``glance`` and
    ``effective`` (or complete) depend on watch time only, ``negative`` on actions only.

    Attributes:
        glance_s: watch time below which an impression is a glance.
        negative_actions: explicit negative actions.
        duration_feature: feature that contains the video's duration in seconds; empty if the log has none.
        duration_edges_s: inner edges (quantiles) of the duration buckets; bucket ``1 + number of edges <= duration``,
            bucket 0 for unknown durations.
        median_watch_s: median watch time of training impressions per bucket; bucket 0 covers all impressions.
    """

    glance_s: float
    negative_actions: list[str]
    duration_feature: str
    duration_edges_s: list[float]
    median_watch_s: list[float]


@dataclass(frozen=True)
class EntityShare:
    """The most frequent user or item of a log.

    Attributes:
        id: raw identifier.
        share: share of all impressions.
        distinct: number of users or items.
    """

    id: str
    share: float
    distinct: int


@dataclass(frozen=True)
class DataQuality:
    """Measurements of all impressions that reveal mistakes in a log or its spec.

    Attributes:
        most_frequent_user: user with the most impressions.
        most_frequent_item: item with the most impressions.
        missing_share: feature -> share of impressions without a value.
        median_duration_s: median duration of the impressions' videos; None if the log has none.
    """

    most_frequent_user: EntityShare
    most_frequent_item: EntityShare
    missing_share: dict[str, float]
    median_duration_s: float | None


@dataclass(frozen=True)
class VocabularyRows:
    """Rows of a vocabulary's table. A value keeps its row as long as it is alive.

    Attributes:
        next_row: first row that no value has had yet; rows from 1 to ``next_row - 1`` have or had a value.
        values: number of values with a row.
        admitted: number of values that got a row in this dataset.
        reused: number of those whose row a retired value had; the row starts anew.
        retired: number of values that lost their row in this dataset: they were unseen for ``ttl_days``.
        waiting: number of values with enough impressions that have no row, because no row is free.
    """

    next_row: int
    values: int
    admitted: int
    reused: int = 0
    retired: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class FeatureSpec:
    """A raw column that becomes a model input.

    Attributes:
        name: feature name.
        level: entity that the feature describes.
        kind: mapping of values to table rows, or ``number`` for a standardized number without a table.
        size: ``hash``: table rows, including row 0 ("unknown"). ``buckets``: number of quantile buckets.
            ``vocabulary``: maximum number of values (the most frequent ones are kept), 0 for no limit.
        min_count: minimum training count of a vocabulary value; rarer values share row 0.
        edges: for ``buckets``, inner edges; empty for training quantiles.
        multi_valued: whether an entity has a list of values; kinds ``vocabulary`` and ``hash``.
        weighted: whether the values of a list have weights.
    """

    name: str
    level: FeatureLevel
    kind: InputKind = "vocabulary"
    size: int = 0
    min_count: int = 1
    edges: tuple[float, ...] = ()
    multi_valued: bool = False
    weighted: bool = False
