"""Logs, dataset cards, models, services and processes shared by tests."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
SAMPLES = REPOSITORY.parent / "shared" / "data"
"""Samples of public logs; tests that read them are skipped if they are missing."""
