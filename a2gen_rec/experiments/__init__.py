"""Comparison of models: suites of runs, equally tuned on validation and tested once at the end (METHODS §8).

Imports training, evaluation, models and data; trains and evaluates through the ``a2gen`` command line.
"""
