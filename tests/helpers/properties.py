"""Numbers of Hypothesis examples that follow the profile."""

from typing import Any

from hypothesis import settings

THOROUGH_FACTOR = 4
"""Examples under the profile ``thorough`` per example under ``default``."""


def examples(count: int, **options: Any) -> settings:
    """Return settings that draw ``count`` examples, and ``THOROUGH_FACTOR`` times as many under ``thorough``."""
    factor = THOROUGH_FACTOR if settings.get_current_profile_name() == "thorough" else 1
    return settings(max_examples=count * factor, deadline=None, **options)
