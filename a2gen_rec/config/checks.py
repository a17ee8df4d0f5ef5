"""Range checks of settings."""

from collections.abc import Callable

from a2gen_rec.errors import ConfigError

Rule = tuple[str, Callable[[float], bool]]

POSITIVE: Rule = ("positive", lambda value: value > 0)
NON_NEGATIVE: Rule = ("at least 0", lambda value: value >= 0)
SEED: Rule = ("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


def check_fields(section: str, values: object, rule: str, predicate: Callable[[float], bool], *names: str) -> None:
    """Raise a ConfigError for the first field of ``values`` that violates the rule; NaN violates every rule."""
    for name in names:
        if not predicate(getattr(values, name)):
            raise ConfigError(f"{section}.{name} {getattr(values, name)} must be {rule}")
