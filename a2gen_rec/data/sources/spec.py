"""YAML spec of a generic log (examples in ``configs/sources/``)."""

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from a2gen_rec.config.parser_errors import parser_error_text
from a2gen_rec.data.csv_errors import CsvDialect
from a2gen_rec.data.names import check_feature_columns
from a2gen_rec.data.schema import ITEM_ID, NUMERIC_KINDS, FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sources.times import TimeFormat, TimeUnit
from a2gen_rec.data.sources.values import MAX_DURATION_S
from a2gen_rec.data.text import value_text
from a2gen_rec.data.time_zone import TimeZone
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils import paths

ColumnNames = str | list[str]
"""A column, or several columns of which the first that is not missing counts; a file has at least one of them."""


def as_list(names: ColumnNames) -> list[str]:
    """Return the given column names; none for an empty name."""
    return [name for name in ([names] if isinstance(names, str) else names) if name]


@dataclass
class FeatureColumn:
    """A column that becomes a feature; ``column`` is empty if it equals the feature's name.

    For the other fields see ``schema.FeatureSpec``. The values of a multi-valued feature are a list, or text with a
    ``delimiter``; ``weights`` is a column of the same form.
    """

    name: str
    level: Literal["user", "item", "context"]
    column: ColumnNames = ""
    kind: Literal["vocabulary", "hash", "buckets", "number"] = "vocabulary"
    size: int = 0
    min_count: int = 1
    edges: list[float] = field(default_factory=list)
    multi_valued: bool = False
    delimiter: str = ""
    weights: ColumnNames = ""

    @property
    def columns(self) -> list[str]:
        return as_list(self.column) or [self.name]


@dataclass
class VectorSpec:
    """A vector of items, such as an embedding of their content.

    Attributes:
        name: name of the vector.
        width: number of elements.
        column: column of the vectors, lists or text with a ``delimiter``; empty if it equals the name.
        file: pattern of side files in the raw directory, one row per item; empty for a column of the log.
        item: column of the item in the side files.
        delimiter: text between the elements of a text column.
    """

    name: str
    width: int
    column: ColumnNames = ""
    file: str = ""
    item: str = ""
    delimiter: str = ""

    @property
    def columns(self) -> list[str]:
        return as_list(self.column) or [self.name]


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
        files: pattern of the log's files in the raw directory: Parquet, or CSV with a header, by their content.
        partition_columns: names of ``name=value`` folders that are columns; other folder names do not matter.
        delimiter: character between CSV values.
        quote: character around CSV values; empty if values are never quoted.
        escape: character before a quote in a quoted CSV value.
        time_unit: unit of the time column's numbers since 1970, or ``timestamp`` for text.
        duration_unit: unit of watch times, action offsets and the video's duration.
        utc_offset_hours: time zone of the log as a fixed offset.
        time_zone: time zone of the log as an IANA name such as ``Asia/Shanghai``, instead of ``utc_offset_hours``.
        zoneless_timestamps: whether timestamps without a zone are ``local`` (the default) or in ``utc``.
        has_calendar_time: whether times are wall-clock times; otherwise they only order the rows.
        features: features; ``user_id`` and ``item_id`` are added if missing.
        vectors: vectors of items.
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
    partition_columns: list[str] = field(default_factory=list)
    delimiter: str = ","
    quote: str = '"'
    escape: str = '"'
    time_unit: TimeUnit = "ms"
    duration_unit: Literal["s", "ms"] = "s"
    utc_offset_hours: float = 0.0
    time_zone: str = ""
    zoneless_timestamps: Literal["local", "utc"] | None = None
    has_calendar_time: bool = True
    features: list[FeatureColumn] = field(default_factory=list)
    vectors: list[VectorSpec] = field(default_factory=list)
    duration_feature: str = ""
    negative_actions: list[str] = field(default_factory=list)
    split: SplitSpec = field(default_factory=SplitSpec)
    licence: str = ""
    citation: str = ""
    url: str = ""

    @property
    def zone(self) -> TimeZone:
        return TimeZone(self.time_zone, self.utc_offset_hours)

    @property
    def time_format(self) -> TimeFormat:
        return TimeFormat(self.time_unit, self.zone, self.zoneless_timestamps, self.has_calendar_time)

    @property
    def dialect(self) -> CsvDialect:
        return CsvDialect(self.delimiter, self.quote, self.escape)

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
                FeatureSpec(
                    x.name, x.level, x.kind, x.size, x.min_count, tuple(x.edges), x.multi_valued, bool(x.weights)
                )
                for x in self.all_features()
            ),
            duration_feature=self.duration_feature,
            negative_actions=tuple(self.negative_actions),
            split=SplitRule(**vars(self.split)),
            has_calendar_time=self.has_calendar_time,
            has_elapsed_time=self.has_calendar_time,
            time_zone=self.zone,
            licence=self.licence,
            citation=self.citation,
            url=self.url,
        )


@dataclass
class ImpressionColumns:
    """Columns of an impression; the watch time is in ``duration_unit`` (``dwell``) or in seconds (``dwell_s``)."""

    user: ColumnNames
    item: ColumnNames
    time: ColumnNames
    dwell: ColumnNames = ""
    dwell_s: ColumnNames = ""


@dataclass
class ActionColumns:
    """Columns of an action: a 0/1 ``flag``, and the time since the start (empty if the action did not occur).

    The time is in ``duration_unit`` (``offset``) or in seconds (``offset_s``). With a flag, the flag determines
    occurrence, and the offset the time, if known.
    """

    flag: ColumnNames = ""
    offset: ColumnNames = ""
    offset_s: ColumnNames = ""


@dataclass(kw_only=True)
class ImpressionsSpec(LogSpec):
    """One row per impression.

    Attributes:
        columns: columns of user, item, time and watch time.
        actions: action -> columns, in vocabulary order.
        labels: label -> column, in vocabulary order.
    """

    columns: ImpressionColumns
    actions: dict[str, ActionColumns] = field(default_factory=dict)
    labels: dict[str, ColumnNames] = field(default_factory=dict)

    def outcome_columns(self) -> dict[str, str]:
        """Return the meaning of every raw column of an outcome."""
        columns = {x: f"label {name!r}" for name, label in self.labels.items() for x in as_list(label)}
        for name, action in self.actions.items():
            names = (action.flag, action.offset, action.offset_s)
            columns |= {column: f"action {name!r}" for keys in names for column in as_list(keys)}
        dwell = (self.columns.dwell, self.columns.dwell_s)
        return columns | {column: "watch time" for keys in dwell for column in as_list(keys)}


@dataclass
class EventColumns:
    user: ColumnNames
    item: ColumnNames
    time: ColumnNames
    action: ColumnNames


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

    def __post_init__(self) -> None:
        # Values of the action column are compared as text, of which one value has one.
        self.open_event, self.close_event = (value_text(x) or "" for x in (self.open_event, self.close_event))
        self.actions = {name: value_text(value) or "" for name, value in self.actions.items()}
        self.ignored_events = [value_text(value) or "" for value in self.ignored_events]


def load_spec(file: str) -> ImpressionsSpec | EventsSpec:
    """Read and check a spec.

    Raises:
        ConfigError: invalid YAML, an unknown or missing key, a value of the wrong type, or keys that contradict.
        DataError: a feature reads an outcome of its own impression.
    """
    # Every scalar is text, and the spec's types decide: an action may be named yes, and a boundary is a date.
    raw = paths.read_yaml(file, as_text=True)
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: must be a mapping with `kind: impressions` or `kind: events`")
    kinds: dict[str, type[ImpressionsSpec] | type[EventsSpec]] = {
        "impressions": ImpressionsSpec,
        "events": EventsSpec,
    }
    if raw.get("kind") not in kinds:
        raise ConfigError(f"{file}: unknown kind {raw.get('kind')!r}; choose one of impressions, events")
    if "time_zone" in raw and "utc_offset_hours" in raw:
        raise ConfigError(f"{file}: time_zone and utc_offset_hours exclude each other; remove one of them")
    spec = parse_spec(kinds[raw["kind"]], raw, file)
    try:
        _check_spec(spec)
        if isinstance(spec, ImpressionsSpec):
            _check_impressions_spec(spec)
            columns = [
                (feature.name, column)
                for feature in spec.features
                for column in (*feature.columns, *as_list(feature.weights))
            ]
            check_feature_columns(columns, spec.outcome_columns(), file)
        else:
            _check_events_spec(spec)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    return spec


def _check_spec(spec: LogSpec) -> None:
    _ = spec.zone
    for vector in spec.vectors:
        if vector.width < 1:
            raise ValueError(f"vector {vector.name!r}: width {vector.width} must be at least 1")
        if bool(vector.file) != bool(vector.item):
            raise ValueError(f"vector {vector.name!r}: file and item require each other")
    separators = {"delimiter": spec.delimiter, "quote": spec.quote, "escape": spec.escape}
    for key, value in separators.items():
        if len(value.encode()) > 1 or value in ("\r", "\n") or (not value and (key == "delimiter" or spec.quote)):
            raise ValueError(f"{key} {value!r} must be one ASCII character")
    if spec.delimiter in (spec.quote, spec.escape):
        raise ValueError(f"delimiter {spec.delimiter!r} must differ from quote and escape")
    for feature in spec.features:
        if feature.size < 0 or feature.min_count < 0:
            raise ValueError(f"feature {feature.name!r}: size and min_count must be at least 0")
        if feature.edges and feature.kind != "buckets":
            raise ValueError(f"feature {feature.name!r}: edges require kind buckets")
        if not all(map(math.isfinite, feature.edges)) or feature.edges != sorted(set(feature.edges)):
            raise ValueError(f"feature {feature.name!r}: edges {feature.edges} must be finite and ascending")
        if feature.name == "user_id" and feature.level != "user":
            raise ValueError("feature 'user_id' must have level 'user'")
        if feature.name == ITEM_ID and feature.level != "item":
            raise ValueError(f"feature {ITEM_ID!r} must have level 'item'")
        if feature.name in ("user_id", ITEM_ID) and (feature.column or feature.kind in NUMERIC_KINDS):
            raise ValueError(f"feature {feature.name!r} must not set column or kind {feature.kind}")
        if feature.multi_valued and (feature.kind in NUMERIC_KINDS or feature.name in ("user_id", ITEM_ID)):
            raise ValueError(f"feature {feature.name!r} must not be multi_valued")
        if not feature.multi_valued and (feature.delimiter or feature.weights):
            raise ValueError(f"feature {feature.name!r}: delimiter and weights require multi_valued")
    if spec.duration_feature and not any(
        x.name == spec.duration_feature and x.kind == "buckets" for x in spec.features
    ):
        raise ValueError(f"duration_feature {spec.duration_feature!r} must be a feature of kind buckets")


def _check_impressions_spec(spec: ImpressionsSpec) -> None:
    _check_unit("columns", "dwell", spec.columns.dwell, spec.columns.dwell_s, spec.duration_unit)
    for name, action in spec.actions.items():
        _check_unit(f"action {name!r}", "offset", action.offset, action.offset_s, spec.duration_unit)
        if not (action.flag or action.offset or action.offset_s):
            raise ValueError(f"action {name!r} requires flag, offset, or both")
    _check_negative_actions(spec.negative_actions, spec.actions)


def _check_events_spec(spec: EventsSpec) -> None:
    _check_negative_actions(spec.negative_actions, spec.actions)
    if not 0 < spec.idle_gap_s <= MAX_DURATION_S:
        raise ValueError(f"idle_gap_s {spec.idle_gap_s} must be positive and at most {MAX_DURATION_S}")
    for key, value in {"open_event": spec.open_event, **{f"action {x!r}": y for x, y in spec.actions.items()}}.items():
        if not value:
            raise ValueError(f"{key} is empty; it must be a value of the action column")
    values = [spec.open_event, *spec.actions.values(), spec.close_event, *spec.ignored_events]
    if duplicates := [value for value in values if value and values.count(value) > 1]:
        raise ValueError(f"duplicate action value {duplicates[0]!r}")


def _check_unit(location: str, key: str, in_unit: ColumnNames, in_seconds: ColumnNames, unit: str) -> None:
    """Check that the unit of a duration is stated once."""
    if in_unit and in_seconds:
        raise ValueError(f"{location}: {key} and {key}_s exclude each other; remove one of them")
    if in_seconds and unit != "s":
        raise ValueError(f"{location}: {key}_s is in seconds, but duration_unit is {unit}; write {key} instead")


def _check_negative_actions(negative_actions: list[str], actions: Collection[str]) -> None:
    for name in negative_actions:
        if name not in actions:
            raise ValueError(f"negative_actions {name!r} must be one of the actions")


def parse_spec(kind: type[Any], raw: dict[str, Any], file: str) -> Any:
    """Parse plain data as the dataclass ``kind``.

    Raises:
        ConfigError: the data do not match; in one line.
    """
    parser = _parser(kind)  # type: ignore[arg-type]  # mypy: a class is not hashable
    try:
        with warnings.catch_warnings():
            # Renamed to `instantiate` in jsonargparse 4.49; both names exist until 5.
            warnings.simplefilter("ignore")
            return kind(**vars(parser.instantiate_classes(parser.parse_object(raw))))
    except ArgumentError as error:
        raise ConfigError(f"{file}: {parser_error_text(error)}") from error


@cache
def _parser(kind: type[Any]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser
