"""YAML spec of a generic log (examples in ``configs/sources/``)."""

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from a2gen_rec.data.names import check_feature_columns
from a2gen_rec.data.schema import ITEM_ID, FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils import paths

TimeUnit = Literal["ms", "s", "us", "timestamp"]


@dataclass
class FeatureColumn:
    """A column that becomes a feature; ``column`` is empty if it equals the feature's name.

    For the other fields see ``schema.FeatureSpec``.
    """

    name: str
    level: Literal["user", "item", "context"]
    column: str = ""
    kind: Literal["vocabulary", "hash", "buckets"] = "vocabulary"
    size: int = 0
    min_count: int = 1
    edges: list[float] = field(default_factory=list)


@dataclass
class SplitSpec:
    """Fields of ``sources.base.SplitRule``."""

    method: Literal["time", "last"] = "time"
    valid_start: str = ""
    test_start: str = ""
    valid_fraction: float = 0.1
    test_fraction: float = 0.1


@dataclass(kw_only=True)
class LogSpec:
    """Fields of both kinds of logs.

    Attributes:
        kind: one row per impression or one row per event.
        name: name of the dataset.
        files: pattern of the log's files in the raw directory; all in one format, Parquet or CSV with a header.
        time_unit: unit of the time column: numbers since 1970, or ``timestamp`` (text or a Parquet timestamp).
        utc_offset_hours: time zone of timestamps without a zone.
        has_calendar_time: whether times are wall-clock times; otherwise they only order the rows.
        features: features; ``user_id`` and ``item_id`` are added if missing.
        duration_feature: feature of kind ``buckets`` that contains the video's duration, in the unit of watch times.
        negative_actions: actions that are explicit negative feedback.
        split: split rule.
        licence: licence of the data.
        citation: publication to cite.
        url: home page of the data.
    """

    kind: Literal["impressions", "events"]
    name: str = "generic"
    files: str = "*"
    time_unit: TimeUnit = "ms"
    utc_offset_hours: float = 0.0
    has_calendar_time: bool = True
    features: list[FeatureColumn] = field(default_factory=list)
    duration_feature: str = ""
    negative_actions: list[str] = field(default_factory=list)
    split: SplitSpec = field(default_factory=SplitSpec)
    licence: str = ""
    citation: str = ""
    url: str = ""

    def all_features(self) -> list[FeatureColumn]:
        names = {feature.name for feature in self.features}
        identifiers = [FeatureColumn("user_id", "user", min_count=2), FeatureColumn(ITEM_ID, "item", min_count=2)]
        return [feature for feature in identifiers if feature.name not in names] + self.features

    def describe(self, actions: list[str], labels: list[str]) -> SourceInfo:
        return SourceInfo(
            name=self.name,
            actions=tuple(actions),
            labels=tuple(labels),
            features=tuple(
                FeatureSpec(x.name, x.level, x.kind, x.size, x.min_count, tuple(x.edges)) for x in self.all_features()
            ),
            duration_feature=self.duration_feature,
            negative_actions=tuple(self.negative_actions),
            split=SplitRule(**vars(self.split)),
            has_calendar_time=self.has_calendar_time,
            has_elapsed_time=self.has_calendar_time,
            utc_offset_hours=self.utc_offset_hours,
            licence=self.licence,
            citation=self.citation,
            url=self.url,
        )


@dataclass
class ImpressionColumns:
    user: str
    item: str
    time: str
    dwell_s: str = ""


@dataclass
class ActionColumns:
    """Columns of an action: a 0/1 ``flag``, an ``offset_s`` since the start (empty if the action did not occur).

    With both, the flag determines occurrence, and the offset the time, if known.
    """

    flag: str = ""
    offset_s: str = ""


@dataclass(kw_only=True)
class ImpressionsSpec(LogSpec):
    """One row per impression.

    Attributes:
        columns: columns of user, item, time and watch time.
        duration_unit: unit of watch times, action offsets and the video's duration.
        actions: action -> columns, in vocabulary order.
        labels: label -> column, in vocabulary order.
    """

    columns: ImpressionColumns
    duration_unit: Literal["s", "ms"] = "s"
    actions: dict[str, ActionColumns] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def outcome_columns(self) -> dict[str, str]:
        """Return the meaning of every raw column of an outcome."""
        columns = {column: f"label {name!r}" for name, column in self.labels.items()}
        for name, action in self.actions.items():
            columns |= {column: f"action {name!r}" for column in (action.flag, action.offset_s) if column}
        return columns | ({self.columns.dwell_s: "watch time"} if self.columns.dwell_s else {})


@dataclass
class EventColumns:
    user: str
    item: str
    time: str
    action: str


@dataclass(kw_only=True)
class EventsSpec(LogSpec):
    """One row per event.

    Attributes:
        columns: columns of user, item, time and action.
        open_event: value that starts an impression.
        actions: action -> value of the action column, in vocabulary order.
        close_event: value whose time is the exit; empty if the log has none.
        ignored_events: values to skip.
        idle_gap_s: maximum seconds between two events of one impression.
    """

    columns: EventColumns
    open_event: str
    actions: dict[str, str] = field(default_factory=dict)
    close_event: str = ""
    ignored_events: list[str] = field(default_factory=list)
    idle_gap_s: float = 1800.0


def load_spec(file: str) -> ImpressionsSpec | EventsSpec:
    """Read and check a spec.

    Raises:
        ConfigError: invalid YAML, an unknown or missing key, or a value of the wrong type.
        DataError: a feature reads an outcome of its own impression.
    """
    try:
        raw = yaml.safe_load(paths.read_text(file))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: invalid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: must be a mapping with `kind: impressions` or `kind: events`")
    kinds: dict[str, type[ImpressionsSpec] | type[EventsSpec]] = {
        "impressions": ImpressionsSpec,
        "events": EventsSpec,
    }
    if raw.get("kind") not in kinds:
        raise ConfigError(f"{file}: unknown kind {raw.get('kind')!r}; choose one of impressions, events")
    if isinstance(split := raw.get("split"), dict):
        # YAML parses 2024-05-01 as a date and 1714521600000 as a number; boundaries are text.
        split.update({key: str(split[key]) for key in ("valid_start", "test_start") if key in split})
    spec = parse_spec(kinds[raw["kind"]], raw, file)
    for feature in spec.features:
        if feature.name == "user_id" and feature.level != "user":
            raise ConfigError(f"{file}: feature 'user_id' must have level 'user'")
        if feature.name == ITEM_ID and feature.level != "item":
            raise ConfigError(f"{file}: feature {ITEM_ID!r} must have level 'item'")
        if feature.name in ("user_id", ITEM_ID) and (feature.column or feature.kind == "buckets"):
            raise ConfigError(f"{file}: feature {feature.name!r} must not set column or kind buckets")
    if spec.duration_feature and not any(
        x.name == spec.duration_feature and x.kind == "buckets" for x in spec.features
    ):
        raise ConfigError(f"{file}: duration_feature {spec.duration_feature!r} must be a feature of kind buckets")
    for name in spec.negative_actions:
        if name not in spec.actions:
            raise ConfigError(f"{file}: negative_actions {name!r} must be one of the actions")
    if isinstance(spec, ImpressionsSpec):
        check_feature_columns({x.name: x.column or x.name for x in spec.features}, spec.outcome_columns(), file)
        for name, action in spec.actions.items():
            if not (action.flag or action.offset_s):
                raise ConfigError(f"{file}: action {name!r} requires flag, offset_s, or both")
    elif spec.idle_gap_s <= 0:
        raise ConfigError(f"{file}: idle_gap_s {spec.idle_gap_s} must be positive")
    else:
        values = [
            spec.open_event,
            *spec.actions.values(),
            *([spec.close_event] if spec.close_event else []),
            *spec.ignored_events,
        ]
        if duplicates := [value for value in values if values.count(value) > 1]:
            raise ConfigError(f"{file}: duplicate action value {duplicates[0]!r}")
    return spec


def parse_spec(kind: type[Any], raw: dict[str, Any], file: str) -> Any:
    """Parse plain data as the dataclass ``kind``.

    Raises:
        ConfigError: the data do not match; in one line.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        with warnings.catch_warnings():
            # Renamed to `instantiate` in jsonargparse 4.49; both names exist until 5.
            warnings.simplefilter("ignore")
            return kind(**vars(parser.instantiate_classes(parser.parse_object(raw))))
    except ArgumentError as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
