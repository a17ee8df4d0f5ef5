"""Training of the ensemble that combines a run's predictions into one score (METHODS §6).

Imports training, evaluation, models and data; its network and file format are in ``models.ensemble``.
"""
