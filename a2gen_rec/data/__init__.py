"""Datasets: the format, preparation from raw logs, and loading of user windows in batches.

May import ``simulation``, ``config``, ``utils`` and ``errors``; ``models`` and higher layers import this package.
"""
