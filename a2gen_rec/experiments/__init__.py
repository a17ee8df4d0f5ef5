"""Comparisons of models: suites of runs, tuned alike on validation and tested once at the end (METHODS §8)."""
