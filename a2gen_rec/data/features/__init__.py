"""Derived features and encodings of raw values, shared by ``prepare`` and online ranking.

May import ``data.schema``, ``data.sql`` and ``data.sources.base``.
"""
