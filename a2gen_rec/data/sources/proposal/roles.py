"""Meaning of a log's columns, guessed from their names and values."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from a2gen_rec.data.sources.proposal import words
from a2gen_rec.data.sources.proposal.profiles import ColumnProfile, LogProfile
from a2gen_rec.data.sources.proposal.words import identifier_score, unit_of
from a2gen_rec.data.sources.times import UNITS_PER_S
from a2gen_rec.data.time_zone import MIN_CALENDAR_MS

MAX_CALENDAR_MS = 4_102_444_800_000
"""Start of the year 2100."""
MAX_EVENT_NAMES = 60
LONG_MEDIAN = 1000
"""Median of a duration from which its unit is milliseconds: the median short video is shorter than 1,000 seconds."""


@dataclass
class Action:
    """Columns of an action."""

    flag: ColumnProfile | None = None
    offset: ColumnProfile | None = None


@dataclass
class Roles:
    """Columns by role; of several columns of users, items or times, the first that is not missing counts.

    Attributes:
        user: columns of users; empty without a candidate.
        item: columns of items; empty without a candidate.
        time: columns of times; empty without a candidate.
        time_unit: unit of the times.
        has_calendar: whether the times are wall-clock times.
        event: column of names of events; None for one row per impression.
        dwell: watch time.
        duration: duration of the video.
        duration_unit: unit of watch time, duration and offsets.
        unit_reason: reason for the unit.
        actions: action -> columns.
        labels: label -> column.
        unused: column -> reason why it is not used.
    """

    user: list[ColumnProfile] = field(default_factory=list)
    item: list[ColumnProfile] = field(default_factory=list)
    time: list[ColumnProfile] = field(default_factory=list)
    time_unit: str = "ms"
    has_calendar: bool = True
    event: ColumnProfile | None = None
    dwell: ColumnProfile | None = None
    duration: ColumnProfile | None = None
    duration_unit: str = ""
    unit_reason: str = ""
    actions: dict[str, Action] = field(default_factory=dict)
    labels: dict[str, ColumnProfile] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [name for name in ("user", "item", "time") if not getattr(self, name)]

    def used(self) -> set[str]:
        columns = [*self.user, *self.item, *self.time, *self.labels.values(), self.event, self.dwell, self.duration]
        columns += [column for action in self.actions.values() for column in (action.flag, action.offset)]
        return {column.name for column in columns if column is not None}


def name_score(names: Iterable[str]) -> int:
    """Return how many of user, item and time the names of a file's columns suggest."""
    names = list(names)
    return (
        any(identifier_score(name, words.USERS) for name in names)
        + any(identifier_score(name, words.ITEMS) for name in names)
        + any(time_score(name) > 0 for name in names)
    )


def time_score(name: str) -> int:
    """Return how clearly a name is that of an impression's start; at most 0 if it is not."""
    parts = set(words.words(name))
    score = 30 * bool(parts & words.MOMENTS) + 10 * bool(parts & words.DAYS) + 10 * bool(parts & words.STARTS)
    others = words.OTHER_MOMENTS | words.ACTION_OF.keys() | words.WATCHES | words.DURATIONS
    return score - 40 * bool(parts & others)


def epoch_unit(column: ColumnProfile) -> str:
    """Return the unit in which the median number is a time from 2000 to 2100; empty if there is none."""
    if not column.is_number or column.median is None:
        return ""
    for unit, per_s in UNITS_PER_S.items():
        if MIN_CALENDAR_MS <= column.median * 1000 / per_s < MAX_CALENDAR_MS:
            return unit
    return ""


def format_number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def guess_roles(profile: LogProfile) -> Roles:
    roles = Roles()
    for column in profile.columns.values():
        if not column.present:
            roles.unused[column.name] = "has no values" + (" in UTF-8" if "BLOB" in column.types else "")
    columns = [column for column in profile.columns.values() if column.present]
    roles.user = _identifiers(profile, columns, words.USERS, "user", roles)
    roles.item = _identifiers(profile, [x for x in columns if x not in roles.user], words.ITEMS, "item", roles)
    columns = [column for column in columns if column.name not in roles.used()]
    _guess_time(profile, columns, roles)
    columns = [column for column in columns if column.name not in roles.used() | roles.unused.keys()]
    flags = [column for column in columns if column.is_flag and words.action_of(column.name)]
    roles.event = None if flags else _event_column(profile, columns)
    _guess_durations(columns, roles)
    if roles.event is None:
        _guess_outcomes([x for x in columns if x.name not in roles.used() | roles.unused.keys()], roles)
    return roles


def _identifiers(
    profile: LogProfile, columns: list[ColumnProfile], nouns: tuple[str, ...], role: str, roles: Roles
) -> list[ColumnProfile]:
    """Return the column with the clearest name, and others that have values where it has none."""
    scored = [(identifier_score(column.name, nouns), column) for column in columns]
    candidates = [column for score, column in sorted(scored, key=lambda x: (-x[0], x[1].index)) if score]
    candidates = [x for x in candidates if not (x.numbers and x.numbers > x.whole) and epoch_unit(x) == ""]
    chosen = candidates[:1]
    for other in candidates[1:]:
        missing = " AND ".join(f"t{column.index} IS NULL" for column in chosen)
        if chosen[0].missing and profile.count(f"{missing} AND t{other.index} IS NOT NULL"):
            chosen.append(other)
    for other in candidates:
        if other not in chosen:
            roles.unused[other.name] = f"another candidate for {role}"
    return chosen


def _guess_time(profile: LogProfile, columns: list[ColumnProfile], roles: Roles) -> None:
    calendar = [column for column in columns if column.is_time or epoch_unit(column)]
    named = [column for column in calendar if time_score(column.name) > 0]
    # Without a word for a time, a text that is a time is clearer than a number.
    others = [x for x in calendar if time_score(x.name) == 0]
    texts = [column for column in others if column.is_time]
    candidates = sorted(named or texts or others, key=lambda x: (-time_score(x.name), -x.distinct, x.index))
    if candidates:
        first = candidates[0]
        roles.time_unit = "timestamp" if first.is_time else epoch_unit(first)
        same_unit = [x for x in candidates[1:] if ("timestamp" if x.is_time else epoch_unit(x)) == roles.time_unit]
        roles.time = [first]
        for other in same_unit:
            if first.missing and profile.count(f"t{first.index} IS NULL AND t{other.index} IS NOT NULL"):
                roles.time.append(other)
    else:
        _guess_order(columns, roles)
    for column in columns:
        parts = set(words.words(column.name))
        if column in roles.time:
            continue
        if column in calendar or (parts & words.DAYS and not parts & words.COUNTS):
            roles.unused[column.name] = "another time; hour_of_day and day_of_week come from the time column"
        elif time_score(column.name) >= 30 and not column.numbers:
            roles.unused[column.name] = f"is text such as {column.example!r}, which is not read as a time"


def _guess_order(columns: list[ColumnProfile], roles: Roles) -> None:
    """Choose numbers that only order the rows."""
    numbers = [column for column in columns if column.is_number and not column.negative and not column.is_flag]
    starts = [
        x for x in numbers if set(words.words(x.name)) & (words.STARTS | words.MOMENTS) and time_score(x.name) > 0
    ]
    orders = [column for column in numbers if set(words.words(column.name)) & words.ORDER_WORDS]
    for column in (starts or orders)[:1]:
        roles.time, roles.has_calendar = [column], False
        roles.time_unit = unit_of(column.name) or ("s" if (column.max or 0) < 1e7 else "ms")


def _event_column(profile: LogProfile, columns: list[ColumnProfile]) -> ColumnProfile | None:
    """Return the column of names of events: by its name, or by its values."""
    few = [x for x in columns if 1 < x.distinct <= MAX_EVENT_NAMES and x.length <= 40 and x.in_all_files]
    few = [column for column in few if not column.is_flag and not column.missing]
    named = [column for column in few if set(words.words(column.name)) & words.EVENT_COLUMNS]
    if named:
        # Of "event" and "event_source", the shorter name.
        return min(named, key=lambda column: (len(words.words(column.name)), column.index))
    texts = [column for column in few if not column.is_number]
    for column, values in profile.values(texts).items():
        known = [value for value in values if words.action_of(value) or set(words.words(value)) & {*words.OPENS}]
        if len(known) >= 2 and 2 * len(known) >= len(values):
            return profile.columns[column]
    return None


def _guess_durations(columns: list[ColumnProfile], roles: Roles) -> None:
    numbers = [x for x in columns if x.is_number and not x.is_flag and not epoch_unit(x) and x.in_all_files]
    watches = sorted((x for x in numbers if _watch_score(x.name) > 0), key=lambda x: -_watch_score(x.name))
    if watches and not watches[0].negative and roles.event is None:
        roles.dwell = watches[0]
    for column in watches:
        if column is not roles.dwell:
            reason = "is sometimes negative, which no watch time is" if column.negative else ""
            other = "looks like an outcome of the impression"
            if roles.event is not None:
                other = "watch times of a log of events come from close_event"
            roles.unused[column.name] = reason or other
    durations = [x for x in numbers if _is_duration(x.name) and not x.negative]
    offsets = [
        x for x in numbers if words.action_of(x.name) and set(words.words(x.name)) & (words.OFFSETS | {*words.UNITS})
    ]
    if roles.event is not None:
        offsets = []
    timed = [column for column in (roles.dwell, *durations[:1], *offsets) if column is not None]
    if not timed:
        return
    by_name = [(column, unit_of(column.name)) for column in timed if unit_of(column.name)]
    if by_name:
        roles.duration_unit, roles.unit_reason = by_name[0][1], f"by the name {by_name[0][0].name}"
    else:
        # Action times are shorter than the watch time.
        medians = [column.median or 0 for column in timed]
        roles.duration_unit = "ms" if max(medians) >= LONG_MEDIAN else "s"
        longest = max(timed, key=lambda column: column.median or 0)
        roles.unit_reason = f"the median of {longest.name} is {format_number(longest.median)}"
    if durations and unit_of(durations[0].name) in ("", roles.duration_unit):
        roles.duration = durations[0]


def _watch_score(name: str) -> int:
    parts = words.words(name)
    rest = [x for x in parts if x not in words.LENGTHS_OF_TIME | words.WATCHES | words.WEAK_WATCHES | {*words.UNITS}]
    has_unit = set(parts) & (words.LENGTHS_OF_TIME | {*words.UNITS})
    if set(parts) & (words.COUNTS - {"total"} | words.SHARES):
        return 0
    if set(parts) & words.WATCHES:
        return 20 - 3 * len(rest)
    return 10 - 3 * len(rest) if set(parts) & words.WEAK_WATCHES and has_unit else 0


def _is_duration(name: str) -> bool:
    parts = set(words.words(name))
    rest = parts - words.LENGTHS_OF_TIME - {*words.UNITS} - {*words.ITEMS}
    return bool(parts & words.DURATIONS) and not rest


def _guess_outcomes(columns: list[ColumnProfile], roles: Roles) -> None:
    """Find actions with flags and times, and labels."""
    for column in columns:
        parts = words.words(column.name)
        name = "_".join(words.ACTION_OF.get(x, x) for x in parts if x not in words.FLAG_WORDS) or column.name
        if column.is_flag and words.action_of(column.name):
            roles.actions.setdefault(name, Action()).flag = column
        elif column.is_flag and set(parts) & words.LABELS:
            roles.labels["_".join(x for x in parts if x not in {"is", "has", "did"}) or column.name] = column
        elif words.action_of(column.name) and not set(parts) & (words.COUNTS | words.SHARES) and column.is_number:
            _guess_offset(column, roles)
    for name, action in list(roles.actions.items()):
        offset = action.offset
        if offset is not None and action.flag is None and offset.zeros > 0.5 * offset.rows:
            roles.unused[offset.name] = "is mostly 0: the time of an action must be empty if it did not occur"
            del roles.actions[name]


def _guess_offset(column: ColumnProfile, roles: Roles) -> None:
    parts = words.words(column.name)
    times = words.OFFSETS | {*words.UNITS}
    if not set(parts) & times:
        return
    unit = unit_of(column.name)
    if epoch_unit(column):
        roles.unused[column.name] = "is a moment; the spec requires the time since the start of the impression"
    elif column.negative:
        roles.unused[column.name] = "is sometimes negative, which no time since the start is"
    elif unit and unit != roles.duration_unit:
        roles.unused[column.name] = f"is in {unit}, other durations are in {roles.duration_unit}"
    else:
        rest = [x for x in parts if x not in times | words.FLAG_WORDS]
        name = "_".join(words.ACTION_OF.get(x, x) for x in rest)
        roles.actions.setdefault(name, Action()).offset = column
