"""Checks of raw values in requests, in which arrays, masked values and values of other types have no meaning."""

from collections.abc import Sequence
from numbers import Real
from typing import TypeGuard

from a2gen_rec.errors import UserError

MAX_VALUE_LENGTH = 60
"""Maximum characters of a value in an error."""


def describe_value(value: object) -> str:
    """Return a value's text for an error: one line, even of an array."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is one number, of Python or numpy; true, false and masked values are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_identifier(value: object, name: str) -> None:
    """Check that a raw identifier is text: the number 5 would be unknown, although the dataset contains "5".

    Raises:
        UserError: It is not text.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, not {describe_value(value)}")


def check_identifiers(values: object, name: str) -> None:
    """Check that raw identifiers are a sequence of text.

    Raises:
        UserError: They are not.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise UserError(f"{name} must be a list of texts, not {describe_value(values)}")
    for value in values:
        check_identifier(value, name)
