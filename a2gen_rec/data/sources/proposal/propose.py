"""From a raw log to the text of a proposed spec."""

import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from a2gen_rec.data.csv_errors import STANDARD_DIALECT, CsvDialect
from a2gen_rec.data.sources.proposal import words
from a2gen_rec.data.sources.proposal.features import propose_features, valid_name
from a2gen_rec.data.sources.proposal.lists import propose_lists
from a2gen_rec.data.sources.proposal.logs import LogFiles, find_log_files, read_profile
from a2gen_rec.data.sources.proposal.profiles import ColumnProfile, LogProfile
from a2gen_rec.data.sources.proposal.roles import format_number, guess_roles
from a2gen_rec.data.sources.proposal.yaml_text import SpecText, scalar
from a2gen_rec.data.sources.times import UNITS_PER_S
from a2gen_rec.data.sources.values import coalesce
from a2gen_rec.data.sql import connect
from a2gen_rec.data.time_zone import MIN_CALENDAR_MS
from a2gen_rec.errors import DataError
from a2gen_rec.utils import paths

TODO = "TODO"
MAX_ACTIONS = 100
"""Maximum number of actions of a dataset."""
DAY_MS = 86_400_000
MAX_LISTED = 12
"""Maximum number of files or columns in a comment."""


@dataclass(frozen=True)
class Proposal:
    """A proposed spec.

    Attributes:
        text: YAML with comments; the spec of ``a2gen prepare generic``.
        missing: columns without a candidate, of user, item and time; the text contains ``TODO`` in their place.
    """

    text: str
    missing: tuple[str, ...]


def propose_spec(raw: str, memory_limit_gb: float = 2.0, threads: int = 0) -> Proposal:
    """Return a spec of the log at ``raw``, guessed from the names and values of its columns.

    Args:
        raw: file or directory of the log, local or remote.
        memory_limit_gb: memory limit of DuckDB in GB; it spills to disk beyond it.
        threads: number of DuckDB threads; 0 uses all cores.

    Raises:
        DataError: no file, no names of columns, no rows, or a file that cannot be read.
        UserError: ``raw`` does not exist, or the memory limit is exceeded.
    """
    log = find_log_files(Path(paths.to_local_path(raw)))
    with tempfile.TemporaryDirectory(prefix="a2gen-spec-") as spill:
        connection = connect(memory_limit_gb, threads, Path(spill))
        with connection:
            profile, dialect, partitions = read_profile(connection, log)
            if not profile.rows:
                raise DataError("has no rows", file=raw)
            return _Writer(raw, log, profile, dialect, partitions).write()


class _Writer:
    """Text of the spec of one log."""

    def __init__(
        self, raw: str, log: LogFiles, profile: LogProfile, dialect: CsvDialect, partitions: list[str]
    ) -> None:
        self.raw, self.log, self.profile, self.dialect, self.partitions = raw, log, profile, dialect, partitions
        self.text = SpecText()
        self.roles = guess_roles(profile)
        self.user, self.item = _first_sql(self.roles.user), _first_sql(self.roles.item)
        self.features = propose_features(profile, self.roles, self.user, self.item)
        self.lists, self.unused_lists = propose_lists(profile, self.user, self.item)

    def write(self) -> Proposal:
        roles, text = self.roles, self.text
        text.note(f"Proposed from {self.raw}: {_rows(self.profile.rows)} in {_plural(len(self.log.paths), 'file')}.")
        text.note("Guessed from the names and values of columns: check every line, then look at some impressions with")
        text.note(f"  a2gen prepare generic --raw {shlex.quote(self.raw)} --spec THIS_FILE --sample 5")
        if roles.missing:
            text.note(f"TODO: no column was recognized as {' or '.join(roles.missing)}.")
        text.blank()
        if roles.event is None:
            text.add("kind: impressions", "guess: one row per impression, as no column contains names of events")
        else:
            text.add("kind: events", f"guess: one row per action, as {roles.event.name} contains names of events")
        text.add(f"name: {scalar(valid_name(Path(self.raw).absolute().name.partition('.')[0] or 'log', []))}")
        self._write_files()
        self._write_times()
        text.blank()
        self._write_columns()
        if roles.event is None:
            self._write_actions_and_labels()
        else:
            self._write_events(roles.event)
        self._write_features()
        self._write_split()
        self._write_unused()
        return Proposal(str(text), tuple(roles.missing))

    def _write_files(self) -> None:
        text, log = self.text, self.log
        if log.pattern:
            text.add(f"files: {scalar(log.pattern)}", f"{_plural(len(log.paths), 'file')} below the directory")
        if not log.is_exact:
            text.note("check: the pattern also matches files that are not part of the log; move or rename them")
        for name, reason in list(log.skipped.items())[:MAX_LISTED]:
            text.note(f"not read: {name}: {reason}")
        if len(log.skipped) > MAX_LISTED:
            text.note(f"not read: {len(log.skipped) - MAX_LISTED:,} further files")
        for key in ("delimiter", "quote", "escape"):
            value = getattr(self.dialect, key)
            if value != getattr(STANDARD_DIALECT, key) and not (key == "escape" and not self.dialect.quote):
                text.add(f"{key}: {scalar(value)}", "the whole log can be read with it")
        used = self.roles.used() | {feature.column.name for feature in self.features}
        if partitions := [name for name in self.partitions if name in used]:
            text.add(f"partition_columns: {scalar(partitions)}", "folders name=value that are columns")

    def _write_times(self) -> None:
        roles, text = self.roles, self.text
        if not roles.time:
            text.add("time_unit: timestamp", f"{TODO}: s, ms, us or ns since 1970, or timestamp for text")
            return
        time = roles.time[0]
        if not roles.has_calendar:
            text.add(f"time_unit: {roles.time_unit}", f"guess: {time.name} is from {time.min:g} to {time.max:g}")
            text.add("has_calendar_time: false", f"guess: {time.name} orders the rows of a user, but is no date")
            return
        if roles.time_unit == "timestamp":
            text.add("time_unit: timestamp", f"text or timestamps such as {time.example}")
        else:
            first, last = (
                _utc(value * 1000 / UNITS_PER_S[roles.time_unit]) for value in (time.min or 0, time.max or 0)
            )
            text.add(f"time_unit: {roles.time_unit}", f"guess: {time.name} is then from {first} to {last} UTC")
        if roles.time_unit != "timestamp" or time.has_zone:
            reason = f"{time.name} needs no zone; this one is for hour_of_day, day_of_week and split boundaries"
        else:
            reason = f"{time.name} has no time zone and is read as local time of this zone"
        text.note(f"guess: UTC. {reason}. By name, with daylight saving time: time_zone: Asia/Shanghai")
        text.add("utc_offset_hours: 0")
        if time.is_utc_by_format:
            text.add("zoneless_timestamps: utc", f"{time.name} has the Parquet type INT96, which Spark writes in UTC")
        if roles.time_unit == "timestamp" and not self.profile.count(f"m{time.index} % {DAY_MS} <> 0"):
            text.note(f"check: {time.name} has no time of day, so that a user's impressions of a day have no order")
        before = (
            f"t{time.index} IS NOT NULL AND NOT coalesce({_ms_sql(time, roles.time_unit)} >= {MIN_CALENDAR_MS}, false)"
        )
        if invalid := self.profile.count(before):
            text.note(f"check: {time.name} is before 2000 in {_rows(invalid)}, which prepare refuses")

    def _write_columns(self) -> None:
        roles, text = self.roles, self.text
        if roles.duration_unit:
            text.add(
                f"duration_unit: {roles.duration_unit}",
                f"guess: {roles.unit_reason}; unit of watch time, offsets and the video's duration",
            )
        text.add("columns:")
        self._write_column("user", roles.user)
        self._write_column("item", roles.item)
        self._write_column("time", roles.time)
        if roles.event is not None:
            text.add(f"  action: {scalar(roles.event.name)}", f"guess: about {roles.event.distinct:,} values")
        elif roles.dwell is not None:
            dwell = roles.dwell
            text.add(
                f"  dwell: {scalar(dwell.name)}",
                f"guess: watch time, median {format_number(dwell.median)} {roles.duration_unit}",
            )
        else:
            text.note("dwell: COLUMN  (no watch time was recognized)", indent=2)

    def _write_column(self, role: str, columns: list[ColumnProfile]) -> None:
        if not columns:
            others = [x for x in self.profile.names if x not in self.roles.used()]
            self.text.add(f"  {role}: {TODO}", f"no candidate; other columns: {_listed(others) or 'none'}")
            return
        names = [column.name for column in columns]
        value = scalar(names[0] if len(names) == 1 else names)
        several = "" if len(names) == 1 else "; the first that is not missing counts"
        meaning = "start of the impression" if self.roles.event is None else "time of the action"
        counts = meaning if role == "time" else f"about {columns[0].distinct:,} values"
        self.text.add(f"  {role}: {value}", f"guess: {counts}{several}")
        missing = self.profile.count(" AND ".join(f"t{column.index} IS NULL" for column in columns))
        if missing:
            self.text.note(f"check: no {role} in {_rows(missing)}, which prepare refuses", indent=2)

    def _write_actions_and_labels(self) -> None:
        roles, text = self.roles, self.text
        text.blank()
        actions: dict[str, Any] = {}
        comments = {}
        for name, action in list(roles.actions.items())[:MAX_ACTIONS]:
            keys = {"flag": action.flag, "offset": action.offset}
            valid = valid_name(name, list(actions), is_outcome=True)
            actions[valid] = {key: column.name for key, column in keys.items() if column is not None}
            flag = action.flag
            count = flag.flags - flag.zeros if flag is not None else action.offset.present if action.offset else 0
            comments[valid] = f"in {_rows(count)}"
        if actions:
            text.note("guess: actions. A flag is 0 or 1; an offset is the time since the start, empty for no action.")
        self._write_block("actions", actions, comments)
        names: dict[str, str] = {}
        for name, column in roles.labels.items():
            names[valid_name(name, [*actions, *names], is_outcome=True)] = column.name
        counts = {name: column.flags - column.zeros for name, column in zip(names, roles.labels.values(), strict=True)}
        if names:
            text.note("guess: outcomes without a time that are not actions")
        self._write_block("labels", names, {name: f"in {_rows(count)}" for name, count in counts.items()})
        negative = [name for name in actions if set(name.split("_")) & words.NEGATIVE]
        if negative:
            text.add(f"negative_actions: {scalar(negative)}", "guess: explicit negative feedback")

    def _write_events(self, event: ColumnProfile) -> None:
        roles, text = self.roles, self.text
        order = f"m{roles.time[0].index}, n{roles.time[0].index}" if roles.time else "0"
        values = self.profile.value_counts(event, self.user or "'all'", self.item or "'all'", order)
        start, close = _open_event(values), ""
        for value in values:
            if value != start and set(words.words(value)) & words.CLOSES:
                close = value
        text.blank()
        rows, firsts = values[start]
        text.add(
            f"open_event: {scalar(start)}",
            f"guess: starts an impression; {_rows(rows)}, first event of {_share(firsts, values)} of the pairs"
            " of user and item",
        )
        if close:
            text.add(f"close_event: {scalar(close)}", f"guess: ends an impression; {_rows(values[close][0])}")
        else:
            text.note("close_event: VALUE  (without it, watch times are unknown)")
        text.add("idle_gap_s: 1800", "guess: an impression ends after half an hour without an event")
        others = [value for value in values if value not in (start, close)]
        actions: dict[str, str] = {}
        comments: dict[str, str] = {}
        for value in others[:MAX_ACTIONS]:
            name = valid_name(value if not value[:1].isdigit() else f"event_{value}", list(actions), is_outcome=True)
            actions[name], comments[name] = value, _rows(values[value][0])
        text.note("guess: all other values are actions. Move those without a meaning to ignored_events.")
        self._write_block("actions", actions, comments)
        text.add(f"ignored_events: {scalar(others[MAX_ACTIONS:])}")

    def _write_block(self, key: str, values: Mapping[str, Any], comments: Mapping[str, str]) -> None:
        self.text.add(f"{key}:" if values else f"{key}: {{}}")
        for name, value in values.items():
            self.text.add(f"  {scalar(name)}: {scalar(value)}", comments[name])

    def _write_features(self) -> None:
        text, roles = self.text, self.roles
        text.blank()
        if self.features:
            text.note("user_id and item_id are added. Keep only features that are known before the impression starts.")
        text.add("features:" if self.features or any(not each.width for each in self.lists) else "features: []")
        taken = [feature.name for feature in self.features]
        for feature in self.features:
            keys: dict[str, Any] = {"name": feature.name}
            if feature.column.name != feature.name:
                keys["column"] = feature.column.name
            keys["level"] = feature.level
            if feature.is_bucketed:
                keys |= {"kind": "buckets", "size": 16}
            elif feature.min_count > 1:
                keys["min_count"] = feature.min_count
            if feature.delimiter:
                keys |= {"multi_valued": True, "delimiter": feature.delimiter}
            text.add(f"  - {scalar(keys)}", f"{feature.evidence}; about {feature.column.distinct:,} values")
        for each in self.lists:
            if not each.width:
                name = valid_name(each.name, taken)
                taken.append(name)
                column = {} if name == each.name else {"column": each.name}
                keys = {"name": name, **column, "level": each.level, "min_count": 2, "multi_valued": True}
                text.add(f"  - {scalar(keys)}", f"lists; {each.evidence}")
        duration = [feature.name for feature in self.features if feature.column is roles.duration]
        if duration:
            text.add(f"duration_feature: {scalar(duration[0])}", "guess: duration of the video")
        vectors = [each for each in self.lists if each.width]
        if vectors:
            text.add("vectors:")
        for each in vectors:
            name = valid_name(each.name, taken)
            taken.append(name)
            column = {} if name == each.name else {"column": each.name}
            text.add(
                f"  - {scalar({'name': name, 'width': each.width, **column})}", f"lists of numbers; {each.evidence}"
            )

    def _write_split(self) -> None:
        text, method = self.text, "time" if self.roles.has_calendar else "last"
        text.blank()
        if method == "time":
            text.note("By days instead: {method: time, valid_start: -2d, test_start: -1d}")
        text.add(f"split: {{method: {method}, valid_fraction: 0.1, test_fraction: 0.1}}")

    def _write_unused(self) -> None:
        unused = dict(self.roles.unused)
        unused |= self.unused_lists | dict.fromkeys(self.profile.nested, "has a nested type")
        unused |= dict.fromkeys(self._duplicate_names(), "occurs twice")
        if unused:
            self.text.blank()
            self.text.note("Columns that are not used:")
        for name, reason in unused.items():
            self.text.note(f"  {name}: {reason}")

    def _duplicate_names(self) -> set[str]:
        return {name for group in self.profile.files.groups for name in group.format.names if name not in group.columns}


def _open_event(values: Mapping[str, tuple[int, int]]) -> str:
    """Return the value with the earliest word of starts; without one, the most frequent first value of a pair."""
    for word in words.OPENS:
        for value in values:
            if word in words.words(value) and not words.action_of(value):
                return value
    return max(values, key=lambda value: (values[value][1], values[value][0]))


def _share(count: int, values: Mapping[str, tuple[int, int]]) -> str:
    total = sum(firsts for _, firsts in values.values())
    return f"{count / total:.0%}" if total else "none"


def _first_sql(columns: list[ColumnProfile]) -> str:
    return coalesce([f"t{column.index}" for column in columns]) if columns else ""


def _ms_sql(time: ColumnProfile, unit: str) -> str:
    return f"m{time.index}" if unit == "timestamp" else f"n{time.index} * {1000 / UNITS_PER_S[unit]!r}"


def _utc(ms: float) -> str:
    try:
        return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M}"
    except (ValueError, OverflowError, OSError):
        return f"{ms:g} ms"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rows(number: int) -> str:
    return _plural(number, "row")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
