"""The dataset card: metadata of a prepared dataset, in ``dataset.yaml``."""

import math
from dataclasses import asdict, dataclass, field, replace
from operator import index
from typing import Any

import yaml

from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.inputs import Number, Vector
from a2gen_rec.data.schema import (
    CARD_FILE,
    EXIT,
    FORMAT_VERSION,
    START,
    DataQuality,
    EntityShare,
    Feature,
    FeatureLevel,
    FeedbackRule,
    Input,
    SplitSummary,
    Statistic,
    VocabularyRows,
)
from a2gen_rec.data.time_zone import TimeZone
from a2gen_rec.errors import DataError
from a2gen_rec.utils import paths


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
