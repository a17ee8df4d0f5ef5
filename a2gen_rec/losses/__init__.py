"""Loss terms as sums over a batch, their means over the global batch, and their weighting.

May import ``models`` and lower layers; ``training``, ``evaluation`` and higher layers import this package.
"""
