"""Gradient boosted trees (LightGBM) on flat rows of features and statistics: a reference for the neural models.

Imports training, evaluation, models and data. LightGBM is imported only when boosters are trained or read.
"""
