import torch

# The tests' tensors are tiny: handing them out to threads costs far more than it saves.
torch.set_num_threads(1)
