"""Training of one run: sharded model, optimizers, loop, checkpoints, and loading of a trained run.

Imports evaluation, losses, sharding, models, data and utils; never ensemble, runs, experiments or serving.
"""
