"""Numbers of Hypothesis examples that follow the profile."""

from typing import Any

from hypothesis import settings

THOROUGH_FACTOR = 4
"""Examples under the profile ``thorough`` per example under ``default``."""


def examples(count: int, thorough: int = 0, **options: Any) -> settings:
    """Return settings that draw ``count`` examples.

    Args:
        count: Number of examples under ``default``.
        thorough: Number of examples under ``thorough``; by default ``THOROUGH_FACTOR`` times ``count``.
        options: Further settings.
    """
    if settings.get_current_profile_name() == "thorough":
        count = thorough or count * THOROUGH_FACTOR
    return settings(max_examples=count, deadline=None, **options)
