"""Terminal tables of datasets, evaluations, rankings, ensembles and sharding plans.

May import ``reporting.formatting``, ``reporting.plan_summary`` and the packages below ``reporting``.
"""
