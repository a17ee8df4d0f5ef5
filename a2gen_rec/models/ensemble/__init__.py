"""Ensemble that combines a ranker's predictions into one score, its baselines, and its files.

May import ``nn``, ``config`` and ``utils``; it knows nothing of rankers and datasets.
"""
