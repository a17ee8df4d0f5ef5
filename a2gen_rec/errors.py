"""Errors a user can mend. The command line prints them as one line; everything else keeps its traceback."""


class UserError(Exception):
    """Something the user gave cannot be used. The message names what, where (file, row, field) and why."""

    exit_code = 1


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or contradicts another."""

    exit_code = 2


class DataError(UserError):
    """A raw log or a prepared dataset does not keep its contract."""

    def __init__(self, reason: str, *, file: object = None, row: int | None = None, field: str | None = None) -> None:
        where = [f"{file}" if file is not None else "", f"row {row}" if row is not None else ""]
        where.append(f"field {field!r}" if field is not None else "")
        prefix = ", ".join(part for part in where if part)
        super().__init__(f"{prefix}: {reason}" if prefix else reason)
