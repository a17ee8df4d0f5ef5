"""Rules that settings keep, and the errors of those that do not."""

from collections.abc import Callable

from a2gen_rec.errors import ConfigError

Rule = tuple[str, Callable[[float], bool]]

POSITIVE: Rule = ("positive", lambda value: value > 0)
NON_NEGATIVE: Rule = ("at least 0", lambda value: value >= 0)


def check_fields(section: str, values: object, rule: str, predicate: Callable[[float], bool], *names: str) -> None:
    """Raise a ConfigError for the first of the settings that breaks the rule (NaN breaks every one)."""
    for name in names:
        if not predicate(getattr(values, name)):
            raise ConfigError(f"{section}.{name} {getattr(values, name)} must be {rule}")
