"""The page of a sharding plan: chart geometry, template, rendering.

May import ``sharding.report`` and ``reporting``.
"""
