"""Simulated logs with known true probabilities (``a2gen simulate``).

May import ``config``, ``utils`` and ``errors`` only.
"""
