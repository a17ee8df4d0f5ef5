"""Baseline rankers with one tower per task: MMoE, PLE and HSTU.

May import ``models.base``, ``nn`` and lower layers. Imported by ``models.factory``, ``models.independent``, ``losses``.
"""
