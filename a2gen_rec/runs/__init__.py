"""Uses of a trained run: evaluation with its ensemble, ranking for one user, and export.

Imports ensemble, training, evaluation, ranking, artifact and below; never experiments or serving.
"""
