"""The dataset format: the files that ``prepare`` writes and the loader reads.

A prepared dataset is a directory::

    dataset.yaml                 dataset card (this module)
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

import math
from dataclasses import asdict, dataclass, field, replace
from operator import index
from typing import Any, Literal

import yaml

from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.inputs import Number, Vector
from a2gen_rec.data.time_zone import TimeZone
from a2gen_rec.errors import DataError
from a2gen_rec.utils import paths

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
class DatasetCard:
    """Metadata of a prepared dataset. Times are in seconds; rates and medians come from training targets only.

    An increment has the rates, medians, edges, scales and rules of the first dataset of its lineage.

    Attributes:
        name: name of the dataset.
        actions: vocabulary in code order; ``start`` is code 0, ``exit`` the last.
        timed_actions: actions with recorded times (including ``exit`` if watch times are recorded).
        labels: impression labels that are not actions; predicted in addition to the sequence.
        objectives: further 0/1 outcomes of an impression, derived from watch time and negative actions.
        features: categorical model inputs.
        feedback: rule of feedback levels and objectives; None if the log records no watch times.
        negative_actions: actions that are explicit negative feedback.
        session_gap_s: maximum seconds between the starts of two impressions of one session.
        max_history: maximum impressions of history per target; windows store one more.
        max_targets: maximum targets per window.
        has_calendar_time: whether ``ts_ms`` is wall-clock time; otherwise only order and possibly elapsed time.
        splits: split name -> counts.
        base_rate: action, label or objective -> share of positives.
        median_time_s: action -> median seconds since the start.
        oracle_columns: actions and labels with a true-probability column.
        dropped_rows: reason -> rows that ``prepare`` dropped.
        source: name, licence, citation and URL of the source.
        command: command that prepared the dataset.
        format_version: version of this format.
        time_features: context features computed from ``ts_ms`` in the log's time zone.
        utc_offset_hours: time zone of the log as a fixed offset.
        time_zone: IANA name of the log's time zone; empty for a fixed offset.
        identity: lineage of the dataset, with the digest of all files except the card, and digests of its inputs.
        quality: measurements that reveal mistakes; None if they are unknown.
        statistics: statistics of item feature values, model inputs of targets.
        numbers: numeric model inputs.
        vectors: vectors of items, model inputs.
        vocabularies: vocabulary feature -> rows of its table, of which ``Feature.cardinality`` is the number.
        ttl_days: days after which an unseen value loses its row in an increment; 0 for never.
    """

    name: str
    actions: list[str]
    timed_actions: list[str]
    labels: list[str]
    objectives: list[str]
    features: list[Feature]
    feedback: FeedbackRule | None
    negative_actions: list[str]
    session_gap_s: float
    max_history: int
    max_targets: int
    has_calendar_time: bool
    splits: dict[str, SplitSummary]
    base_rate: dict[str, float]
    median_time_s: dict[str, float]
    oracle_columns: list[str]
    dropped_rows: dict[str, int]
    source: dict[str, str]
    command: str
    format_version: int = FORMAT_VERSION
    time_features: list[str] = field(default_factory=list)
    utc_offset_hours: float = 0.0
    time_zone: str = ""
    identity: DataIdentity = field(default_factory=DataIdentity)
    quality: DataQuality | None = None
    statistics: list[Statistic] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    vocabularies: dict[str, VocabularyRows] = field(default_factory=dict)
    ttl_days: float = 0.0

    @property
    def is_increment(self) -> bool:
        """Whether the dataset continues an earlier one."""
        return len(self.identity.lineage) > 1

    @property
    def end_ms(self) -> int:
        """Start of the last impression; 0 without any."""
        return max((split.last_ms for split in self.splits.values() if split.last_ms is not None), default=0)

    @property
    def zone(self) -> TimeZone:
        """Time zone of the log."""
        return TimeZone(self.time_zone, self.utc_offset_hours)

    @property
    def predicted_actions(self) -> list[str]:
        """Actions with predicted occurrence: all except ``start`` and ``exit``."""
        return self.actions[1:-1]

    def features_at(self, level: FeatureLevel) -> list[Feature]:
        return [feature for feature in self.features if feature.level == level]

    def bags_at(self, *levels: FeatureLevel) -> list[Feature]:
        """Return the multi-valued features of some levels."""
        return [feature for feature in self.features if feature.level in levels and feature.multi_valued]

    @property
    def inputs(self) -> list[Input]:
        """All model inputs that describe a user, an item or an impression."""
        return [*self.features, *self.numbers]

    def numbers_at(self, *levels: FeatureLevel) -> list[Number]:
        """Return the numbers of some levels, level by level."""
        return [number for level in levels for number in self.numbers if number.level == level]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def without_command(self) -> dict[str, Any]:
        """Return plain data that are equal in every copy of a dataset, whatever command prepared it."""
        card = self.to_dict()
        del card["command"]
        return card

    def save(self, dataset: str) -> None:
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, width=100, allow_unicode=True)
        paths.write_text(paths.join(dataset, CARD_FILE), text)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], file: str = CARD_FILE) -> "DatasetCard":
        """Build a card from plain data.

        Raises:
            DataError: a field is missing or unknown, a number is invalid, or the format version is unsupported.
        """
        try:
            if raw["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"unsupported format version {raw['format_version']}, expected {FORMAT_VERSION}",
                    file=file,
                    field="format_version",
                )
            features = [_validate_feature(Feature(**feature)) for feature in raw["features"]]
            splits = {name: SplitSummary(**split) for name, split in raw["splits"].items()}
            feedback = None if raw["feedback"] is None else _validate_rule(FeedbackRule(**raw["feedback"]))
            quality = raw.get("quality")
            if quality is not None:
                users, items = (EntityShare(**quality[f"most_frequent_{name}"]) for name in ("user", "item"))
                quality = DataQuality(**{**quality, "most_frequent_user": users, "most_frequent_item": items})
            card = cls(
                **{
                    **raw,
                    "features": features,
                    "splits": splits,
                    "feedback": feedback,
                    "identity": DataIdentity.from_dict(raw["identity"]),
                    "quality": quality,
                    "statistics": [Statistic(**statistic) for statistic in raw["statistics"]],
                    "vectors": [Vector(**vector).validated() for vector in raw["vectors"]],
                    "numbers": [Number(**number).validated() for number in raw["numbers"]],
                    "vocabularies": {name: VocabularyRows(**rows) for name, rows in raw["vocabularies"].items()},
                }
            )
            card = replace(
                card, session_gap_s=float(card.session_gap_s), utc_offset_hours=_finite_float(card.utc_offset_hours)
            )
            _ = card.zone
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"invalid dataset card ({error})", file=file) from error
        if len(card.actions) < 2 or card.actions[0] != START or card.actions[-1] != EXIT:
            raise DataError(f"actions must begin with {START!r} and end with {EXIT!r}", file=file, field="actions")
        if not set(card.negative_actions) <= set(card.predicted_actions):
            raise DataError("must be among the actions", file=file, field="negative_actions")
        return card

    @classmethod
    def load(cls, dataset: str) -> "DatasetCard":
        """Read ``dataset.yaml`` of a prepared dataset.

        Raises:
            DataError: the card is missing or invalid.
            UserError: the directory does not exist.
        """
        file = paths.join(dataset, CARD_FILE)
        if not paths.exists(file):
            paths.require_dir(dataset)
            raise DataError("dataset card not found; run `a2gen prepare` first", file=file)
        try:
            raw = yaml.safe_load(paths.read_text(file))
        except yaml.YAMLError as error:
            raise DataError(f"invalid YAML ({str(error).splitlines()[0]})", file=file) from error
        return cls.from_dict(raw, file)


def _validate_feature(feature: Feature) -> Feature:
    """Check the numbers: they become SQL."""
    edges = [float(edge) for edge in feature.boundaries]
    return replace(feature, cardinality=index(feature.cardinality), boundaries=edges)


def _validate_rule(rule: FeedbackRule) -> FeedbackRule:
    """Check the numbers: they become SQL."""
    return replace(
        rule,
        glance_s=_finite_float(rule.glance_s),
        duration_edges_s=[_finite_float(edge) for edge in rule.duration_edges_s],
        median_watch_s=[_finite_float(median) for median in rule.median_watch_s],
    )


def _finite_float(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


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
