"""Neural network layers on plain tensors: attention, encoder, generator, experts, monotonic transforms.

May import ``utils`` only; it knows nothing of datasets and configurations.
"""
