"""Logs, cards, models, services and processes that tests share."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
SAMPLES = REPOSITORY.parent / "shared" / "data"
"""Samples of public logs; tests that read them are skipped where they are absent."""
