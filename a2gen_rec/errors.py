"""Errors that a user can fix. The command line prints them as one line; other errors keep their traceback."""


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
