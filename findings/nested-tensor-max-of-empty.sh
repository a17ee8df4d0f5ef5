#!/usr/bin/env bash
# torch 2.13.0, jagged nested tensors: the maximum of an empty sequence is -3.4e38 at index 0; the mean is NaN.
#
# Expected: an error or -inf. torch.amax of an empty dimension raises "Expected reduction dim 0 to have non-zero
# size", and torch.segment_reduce(..., "max") returns -inf, which an isfinite check finds.
#
# Seen: `nested.max(1)` pads with the smallest finite float, so a user with an empty history has the finite
# value -3.4028e38 and argmax 0, an index that does not exist. The sum is 0 and the mean is NaN: three
# conventions in one type.
#
# Hurt: max-pooled histories of new users. torch.isfinite passes; the next linear layer overflows or saturates,
# and a gather at the argmax reads the first row of the next user. Workaround: mask by offsets().diff() == 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import torch

print("torch", torch.__version__)
values, offsets = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2, 2, 3])  # the second history is empty
history = torch.nested.nested_tensor_from_jagged(values, offsets)
maximum, index = (x[1, 0].item() for x in history.max(1))
mean, total = history.mean(1)[1, 0].item(), history.sum(1)[1, 0].item()
segment = torch.segment_reduce(values[:, 0], "max", lengths=offsets.diff())[1].item()
print("empty history: nested max", maximum, "index", index, "mean", mean, "sum", total, "; segment_reduce max", segment)
try:
    torch.empty(0).amax(0)
    refused = False
except (RuntimeError, IndexError) as error:
    refused = True
    print("torch.amax refuses:", str(error).splitlines()[0])
print("expected: -inf or an error")
finite_minimum = torch.finfo(torch.float32).min
sys.exit((refused, maximum, index, total, segment, mean != mean) != (True, finite_minimum, 0, 0, -torch.inf, True))
PYTHON
