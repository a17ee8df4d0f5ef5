"""Sharding plans of embedding tables: workload, hardware, planner, saved plans, reports and remedies.

May import ``models``, ``data``, ``config``, ``utils`` and ``errors``.
"""
