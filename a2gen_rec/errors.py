"""Errors that a user can fix. The command line prints them as one line; other errors keep their traceback."""

import re


class UserError(Exception):
    """Invalid user input. The message names the location (file, row, field) and the reason."""

    exit_code = 1


class ConfigError(UserError):
    """A setting is unknown, has the wrong type, or conflicts with another."""

    exit_code = 2


class DataError(UserError):
    """A raw log or a prepared dataset violates its format."""

    def __init__(self, reason: str, *, file: object = None, row: int | None = None, field: str | None = None) -> None:
        location = [f"{file}" if file is not None else "", f"row {row}" if row is not None else ""]
        location.append(f"field {field!r}" if field is not None else "")
        prefix = ", ".join(part for part in location if part)
        super().__init__(f"{prefix}: {reason}" if prefix else reason)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error without the type at its start; the type if there is no text."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"^[A-Z][\w ]* Error: ", "", text.splitlines()[0])
