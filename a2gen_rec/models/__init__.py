"""Rankers on top of embedding tables, their factory, and the predictions that they make per target.

May import ``data``, ``nn``, ``config`` and lower layers; losses, training, evaluation and ranking import this package.
"""
