"""Preparation of a dataset from a raw log (``a2gen prepare``).

May import all of ``data`` except the loader and batches.
"""
