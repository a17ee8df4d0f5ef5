"""Baseline rankers with one tower per task: MMoE, PLE and HSTU.

May import ``models.base``, ``nn`` and lower layers; ``models.factory``, ``models.independent`` and ``losses`` import it.
"""
