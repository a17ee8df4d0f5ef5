"""Test settings: one thread per process, and Hypothesis profiles.

``default`` runs on every change. ``thorough`` (``make test-all``) draws many more examples per property.
"""

import torch
from hypothesis import settings

# The tensors of tests are tiny: distributing them over threads costs far more than it saves.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=400)
settings.load_profile("default")
