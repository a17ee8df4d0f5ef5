"""Evaluation of a model on one split: predictions of all ranks, metrics and trivial baselines (METHODS §8).

Imports losses, models, data and utils; never training.
"""
