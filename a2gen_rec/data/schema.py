"""The dataset contract: what ``prepare`` writes and the loader reads, and nothing else.

A prepared dataset is a folder::

    dataset.yaml                 the dataset card (this module)
    train/ valid/ test/*.parquet one row per user window
    items.parquet                every item: raw ``item`` (string), its item-level feature rows and its length
    users.parquet                every user: raw ``user`` (string), ``user_key`` and its user-level feature rows
    item_statistics.parquet      training impressions and positives per ``item_id`` row
    vocabulary/FEATURE.parquet   raw ``value`` (string) to table ``row`` (int64), for vocabulary features

A window is one user's impressions in time order: history first, then targets. Columns of a window::

    user             string          raw user identifier
    user_key         int64           hash of the raw identifier: grouping and sharing out
    <user feature>   int64           row of the feature's table
    <item feature>   list<int64>     one per impression; ``item_id`` is always present
    <context, session or outcome feature> list<int64>    one per impression
    ts_ms            list<int64>     begin of the impression
    dwell_s          list<float>     watch time, NaN when the log does not record it
    action           list<list<int8>>    codes into ``actions``: start first, exit last
    action_offset_s  list<list<float>>   seconds since the impression began, NaN when not recorded
    label_<name>     list<float>     0, 1, or NaN when unknown
    objective_<name> list<float>     0, 1, or NaN when unknown
    oracle_<action>  list<float>     true probability, simulated data only
    first_target     int32           impressions before it are history only

Row 0 of every table stands for "unknown": values unseen, missing, or too rare in the training data.

Session features are known when an impression begins, outcome features only when it has ended: those of a target are
never its inputs. Of both, rows and values are made by ``prepare`` (``sessions.py``, ``feedback.py``).
"""

import math
from dataclasses import asdict, dataclass, field, replace
from operator import index
from typing import Any, Literal

import yaml

from a2gen_rec.errors import DataError
from a2gen_rec.utils import paths

START, EXIT = "start", "exit"
SPLITS = ("train", "valid", "test")
FORMAT_VERSION = 3
CARD_FILE = "dataset.yaml"
ITEM_ID = "item_id"

SESSION_POSITION, SESSION_GAP, PREVIOUS_FEEDBACK = "session_position", "session_gap", "previous_feedback"
FEEDBACK, WATCH_RATIO = "feedback", "watch_ratio"
RAW_DURATION_COLUMN = "raw_length_s"
"""Column of ``items.parquet``: the video's length as the log has it, where feedback goes by it."""
OBJECTIVES = ("glance", "effective", "negative")
WATCH_TIME = "watch_time"
"""What users of a log that records it are predicted to spend, beside the objectives."""
FEEDBACK_LEVELS = ("unknown", "negative", "glance", "partial", "effective", "complete")
"""Of impressions, in code order: the codes are rows of the tables ``feedback`` and ``previous_feedback``."""
UNKNOWN, NEGATIVE, GLANCE, PARTIAL, EFFECTIVE, COMPLETE = range(len(FEEDBACK_LEVELS))

FeatureLevel = Literal["user", "item", "context", "session", "outcome"]
FeatureKind = Literal["vocabulary", "hash", "buckets", "code"]


@dataclass(frozen=True)
class Feature:
    """One categorical input, and how its raw values became table rows.

    Attributes:
        kind: ``code``: values are rows as they are, such as feedback levels.
        cardinality: rows of its table, row 0 ("unknown") included.
        boundaries: for ``buckets``, the sorted inner edges; row ``1 + number of edges <= value``.
    """

    name: str
    level: FeatureLevel
    kind: FeatureKind
    cardinality: int
    boundaries: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split.

    Attributes:
        first_ms, last_ms: begin of its first and last target.
        positives: targets per action, label and objective that have it.
        feedback: targets per feedback level; empty where the log gives none.
    """

    windows: int
    targets: int
    first_ms: int | None
    last_ms: int | None
    positives: dict[str, int]
    feedback: dict[str, int]


@dataclass(frozen=True)
class FeedbackRule:
    """What makes an impression's feedback level, and its objectives [ours].

    The first of these that holds: *negative*, one of the ``negative`` actions happened; *unknown*, no watch time;
    *complete*, watched for the video's length or longer; *glance*, for less than ``glance_s``; *effective*, for the
    median of its length's bucket or longer; else *partial*. The objectives ``glance`` and ``effective`` (or complete)
    go by watch time alone, ``negative`` by the actions alone.

    Attributes:
        negative: explicit negative actions.
        duration: the feature that holds the video's length in seconds; empty where the log does not tell it.
        duration_edges_s: inner edges of the buckets of lengths, which are quantiles; bucket ``1 + number of
            edges <= length``, bucket 0 of unknown length.
        median_watch_s: per bucket, the median watch time of training impressions; bucket 0 takes all of them.
    """

    glance_s: float
    negative_actions: list[str]
    duration_feature: str
    duration_edges_s: list[float]
    median_watch_s: list[float]


@dataclass(frozen=True)
class DatasetCard:
    """What is known of a prepared dataset. Times in seconds, rates and medians from training targets only.

    Attributes:
        actions: vocabulary in code order; ``start`` is code 0, ``exit`` the last.
        timed: actions whose times the log records (``exit`` too, where dwell is recorded).
        labels: impression labels that are not acts, predicted beside the sequence.
        objectives: further 0/1 outcomes of an impression, derived from watch time and negative actions.
        feedback: what levels and objectives follow from; None where the log records no watch times.
        negative: those of the actions that are explicit negative feedback, whatever else the log records.
        session_gap_s: seconds between the begins of two impressions beyond which a session ends.
        history: most impressions before a target it may see; windows carry one more.
        max_targets: most targets of one window.
        calendar: whether ``ts_ms`` is wall-clock time (else only order and, if any, elapsed time).
        from_time: context features computed from ``ts_ms`` in a zone of ``utc_offset_hours``; None in cards made before
            there was the field.
        oracle: actions (and labels) with a true probability column.
        dropped: impressions left out by ``prepare``, by reason.
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
    time_features: list[str] | None = None
    utc_offset_hours: float = 0.0

    @property
    def predicted_actions(self) -> list[str]:
        """Actions whose occurrence is predicted: all but ``start`` and ``exit``."""
        return self.actions[1:-1]

    def features_at(self, level: FeatureLevel) -> list[Feature]:
        return [feature for feature in self.features if feature.level == level]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, dataset: str) -> None:
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, width=100, allow_unicode=True)
        paths.write_text(paths.join(dataset, CARD_FILE), text)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], file: str = CARD_FILE) -> "DatasetCard":
        """Build a card from plain data.

        Raises:
            DataError: a field is missing, unknown, no number where it must be, or of another format version.
        """
        try:
            if raw["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"is {raw['format_version']}, this version reads {FORMAT_VERSION}",
                    file=file,
                    field="format_version",
                )
            features = [_validate_feature(Feature(**feature)) for feature in raw["features"]]
            splits = {name: SplitSummary(**split) for name, split in raw["splits"].items()}
            feedback = None if raw["feedback"] is None else _validate_rule(FeedbackRule(**raw["feedback"]))
            made = {"features": features, "splits": splits, "feedback": feedback}
            card = cls(**{**raw, **made})
            card = replace(
                card, session_gap_s=float(card.session_gap_s), utc_offset_hours=_finite_float(card.utc_offset_hours)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not a dataset card ({error})", file=file) from error
        if len(card.actions) < 2 or card.actions[0] != START or card.actions[-1] != EXIT:
            raise DataError(f"must run from {START!r} to {EXIT!r}", file=file, field="actions")
        if not set(card.negative_actions) <= set(card.predicted_actions):
            raise DataError("must be among the actions", file=file, field="negative_actions")
        return card

    @classmethod
    def load(cls, dataset: str) -> "DatasetCard":
        """Read ``dataset.yaml`` of a prepared dataset.

        Raises:
            DataError: it is not there or breaks the contract.
        """
        file = paths.join(dataset, CARD_FILE)
        if not paths.exists(file):
            raise DataError("no dataset card here; run `a2gen prepare` first", file=file)
        try:
            raw = yaml.safe_load(paths.read_text(file))
        except yaml.YAMLError as error:
            raise DataError(f"not YAML ({str(error).splitlines()[0]})", file=file) from error
        return cls.from_dict(raw, file)


def _validate_feature(feature: Feature) -> Feature:
    """With numbers that are numbers: they become SQL."""
    edges = [float(edge) for edge in feature.boundaries]
    return replace(feature, cardinality=index(feature.cardinality), boundaries=edges)


def _validate_rule(rule: FeedbackRule) -> FeedbackRule:
    """See :func:`_numbers_checked`."""
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
    """A raw column that becomes a table.

    Attributes:
        size: ``hash``: table rows (row 0 stays "unknown"); ``buckets``: how many quantile buckets;
            ``vocabulary``: most values kept (the most frequent ones), 0 for no bound.
        min_count: vocabulary values rarer than this in the training data share row 0.
        edges: for ``buckets``, the inner edges; empty takes training quantiles.
    """

    name: str
    level: FeatureLevel
    kind: FeatureKind = "vocabulary"
    size: int = 0
    min_count: int = 1
    edges: tuple[float, ...] = ()
