"""Features of a proposed spec: columns that may be known before the impression, with level and encoding."""

from dataclasses import dataclass

from a2gen_rec.data.names import check_names
from a2gen_rec.data.sources.proposal import words
from a2gen_rec.data.sources.proposal.levels import Level, level_of
from a2gen_rec.data.sources.proposal.lists import MAY_BE_OUTCOME, delimiter_of
from a2gen_rec.data.sources.proposal.profiles import ColumnProfile, LogProfile
from a2gen_rec.data.sources.proposal.roles import Roles
from a2gen_rec.errors import DataError

MAX_TEXT_LENGTH = 40
"""Mean number of characters from which a text is free text, not a category."""
MAX_CATEGORIES = 50
"""Number of values from which numbers such as counts and sizes become buckets."""
UNIQUE_SHARE = 0.9
"""Share of distinct values from which a column identifies its rows, items or users."""
MIN_UNIQUE = 20
UNBOUNDED = 1000
"""Number of values from which rare values share a row."""


@dataclass(frozen=True)
class ProposedFeature:
    """A feature, and the evidence for its level; with a delimiter, it is multi-valued."""

    name: str
    column: ColumnProfile
    level: Level
    evidence: str
    is_bucketed: bool
    delimiter: str = ""

    @property
    def min_count(self) -> int:
        return 2 if self.column.distinct > UNBOUNDED and not self.is_bucketed else 1


def propose_features(profile: LogProfile, roles: Roles, user: str, item: str) -> list[ProposedFeature]:
    """Return the features; the reasons of other columns are added to ``roles.unused``.

    Args:
        profile: columns of the log.
        roles: meaning of the columns.
        user: SQL of users; empty if unknown.
        item: SQL of items; empty if unknown.
    """
    columns, delimiters = [], dict[str, str]()
    # Readers and the check of the spec compare names without case.
    used = {name.casefold() for name in roles.used() - ({roles.duration.name} if roles.duration else set())}
    for column in profile.columns.values():
        if column.name.casefold() in used or column.name in roles.unused:
            continue
        if delimiter := delimiter_of(profile, column):
            delimiters[column.name] = delimiter
        reason = _unusable(column, column.name in delimiters)
        if not reason and column.distinct > MIN_UNIQUE and not (user and item):
            reason = "may be the user or the item"
        if reason:
            roles.unused[column.name] = reason
        else:
            columns.append(column)
    by_item = profile.variations(item, columns) if item else {}
    by_user = profile.variations(user, columns) if user else {}
    features: list[ProposedFeature] = []
    for column in columns:
        level, evidence = level_of(by_item.get(column.name), by_user.get(column.name))
        entities = {"item": roles.item, "user": roles.user, "context": []}[level]
        groups = entities[0].distinct if entities else profile.rows
        is_duration = column is roles.duration
        if not is_duration and (reason := _unsuitable(column, level, groups, column.name in delimiters)):
            roles.unused[column.name] = reason
            continue
        name = valid_name("duration" if is_duration else column.name, [feature.name for feature in features])
        is_bucketed = is_duration or _is_quantity(column)
        delimiter = delimiters.get(column.name, "")
        features.append(ProposedFeature(name, column, level, evidence, is_bucketed, delimiter))
    return features


def valid_name(column: str, taken: list[str], is_outcome: bool = False) -> str:
    """Return a valid, unused name that is similar to a column's name."""
    plain = "".join(x if x.isalnum() or x in "_-" else "_" for x in column).strip("-_")[:40] or "column"
    names = [column, plain, f"column_{plain}", *(f"column_{plain}_{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if _is_valid(name, taken, is_outcome))


def _is_valid(name: str, taken: list[str], is_outcome: bool) -> bool:
    names = [*taken, name]
    try:
        check_names([] if is_outcome else ["user_id", "item_id", *names], names if is_outcome else [])
    except DataError:
        return False
    return True


def _unusable(column: ColumnProfile, is_list: bool) -> str:
    """Return why a column cannot be a feature of any level; empty if it can."""
    if column.is_constant:
        return "has one value"
    if not column.in_all_files:
        return "is not in every file"
    if column.length > MAX_TEXT_LENGTH and not is_list:
        return "is free text"
    if column.is_time or any(kind.startswith(("TIMESTAMP", "DATE", "TIME")) for kind in column.types):
        return "is a time"
    return ""


def _unsuitable(column: ColumnProfile, level: Level, groups: int, is_list: bool) -> str:
    """Return why a column is not proposed at its level; empty if it is.

    Args:
        column: the column.
        level: level of the feature.
        groups: number of items, users or rows.
        is_list: whether its text has several values.
    """
    is_unique = column.distinct > MIN_UNIQUE and column.distinct >= UNIQUE_SHARE * groups
    if is_unique and not is_list and not _is_quantity(column):
        return f"has another value for almost every {'row' if level == 'context' else level}"
    if level == "context" and words.may_be_outcome(column.name):
        return MAY_BE_OUTCOME
    if level == "context" and column.is_flag:
        return "0 or 1: add it to actions or labels if it is an outcome, or to features if it is known before"
    return ""


def _is_quantity(column: ColumnProfile) -> bool:
    """Return whether a column is a number whose order has a meaning, rather than the number of a category."""
    if not column.is_number or column.is_flag:
        return False
    parts = set(words.words(column.name))
    if parts & words.ID_WORDS:
        return False
    has_fractions = column.whole < column.numbers
    if parts & words.DURATIONS:
        return True
    return (has_fractions and column.distinct > 10) or (column.distinct > MAX_CATEGORIES and bool(parts & words.SIZES))
