"""Rule of the names of features, actions and labels; ``prepare`` and the planner share it.

Names become columns, files, options and keys of reports. DuckDB compares columns without case, file systems may too.
Helper columns of SQL relations therefore contain a space, which no name can, and names are compared without case.
"""

import re
from collections.abc import Iterable, Mapping

from a2gen_rec.data.schema import (
    EXIT,
    FEEDBACK,
    ITEM_ID,
    ITEM_INDEX,
    OBJECTIVES,
    PREVIOUS_FEEDBACK,
    RAW_DURATION_COLUMN,
    SESSION_GAP,
    SESSION_POSITION,
    START,
    STATISTICS_COLUMN,
    USER_ID,
    WATCH_RATIO,
    WATCH_TIME,
)
from a2gen_rec.errors import DataError

MAX_NAME_BYTES = 128
"""Maximum length of a name in UTF-8; file systems limit file names to 255 bytes."""
IDENTIFIERS = (USER_ID, ITEM_ID)
RESERVED = frozenset(
    (
        "user",
        "item",
        "user_key",
        "ts_ms",
        "t_ms",
        "dwell_s",
        "action",
        "action_offset_s",
        "first_target",
        "split",
        "drop_reason",
        "impressions",
        "time_bucket",
        "gap_bucket",
        SESSION_POSITION,
        SESSION_GAP,
        PREVIOUS_FEEDBACK,
        FEEDBACK,
        WATCH_RATIO,
        RAW_DURATION_COLUMN,
        STATISTICS_COLUMN,
        ITEM_INDEX,
        *OBJECTIVES,
    )
)
"""Columns of relations and datasets, and tables of the model."""
RESERVED_PREFIXES = ("at_", "label_", "objective_", "oracle_")
"""Prefixes of the columns of outcomes."""
RESERVED_OUTCOMES = frozenset((START, EXIT, "padding", WATCH_TIME, "watch", "ensemble", *IDENTIFIERS))
"""Reserved names of actions and labels: other predictions, sort keys and columns use them."""


def check_names(features: Iterable[str], outcomes: Iterable[str] = ()) -> None:
    """Check the names of features, and of outcomes (actions and labels).

    A feature and an outcome may have the same name.

    Raises:
        DataError: a name is malformed, reserved or duplicate, regardless of case.
    """
    _check_group(features, frozenset())
    _check_group(outcomes, RESERVED_OUTCOMES)


def check_feature_columns(features: Iterable[tuple[str, str]], outcomes: Mapping[str, str], file: str) -> None:
    """Check that no feature is read from an outcome of its own impression.

    Args:
        features: pairs of a feature and one of its raw columns.
        outcomes: raw column -> meaning, such as "watch time".
        file: spec of the log, for errors.

    Raises:
        DataError: a feature and an outcome have the same column, regardless of case.
    """
    meanings = {column.casefold(): meaning for column, meaning in outcomes.items()}
    for name, column in features:
        if meaning := meanings.get(column.casefold()):
            raise DataError(
                f"column {column!r} is the {meaning} of the same impression, not an input", file=file, field=name
            )


def _check_group(names: Iterable[str], reserved: frozenset[str]) -> None:
    first: dict[str, str] = {}
    for name in names:
        if reason := _invalid_reason(name, reserved):
            raise DataError(reason, field=name)
        other = first.get(name.casefold())
        if other is not None:
            only_case = "" if other == name else f": differs from {other!r} only in case"
            raise DataError(f"duplicate name {name!r}{only_case}", field=name)
        first[name.casefold()] = name


def _invalid_reason(name: str, reserved: frozenset[str]) -> str:
    """Return why a single name is invalid; empty if it is valid."""
    if not name:
        return "name is empty"
    if not re.fullmatch(r"\w[\w-]*", name):
        return f"invalid name {name!r}: must consist of letters, digits, '_' and '-', and not begin with '-'"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"name of {len(name.encode())} bytes {name[:20]!r}…: must have at most {MAX_NAME_BYTES} bytes"
    folded = name.casefold()
    if folded in RESERVED | reserved or (folded in IDENTIFIERS and name not in IDENTIFIERS):
        return f"reserved name {name!r}"
    prefix = next((prefix for prefix in RESERVED_PREFIXES if folded.startswith(prefix)), "")
    return f"reserved name {name!r}: must not begin with {prefix!r}" if prefix else ""
