#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: a lazily conjugated or negated tensor is saved without the operation.
#
# Expected: load_file returns the values that were saved. A non-contiguous tensor, another kind of view, is
# refused with a clear error.
#
# Seen: torch evaluates `.conj()` and the imaginary part of a conjugate lazily (documentation of torch.conj and
# torch.resolve_neg: "a view with the negative bit set"). The tensor counts as contiguous, and save_file copies
# the raw memory. The file has the wrong sign. torch.save of the same tensor is exact.
#
# Hurt: recommenders with complex embeddings (ComplEx, RotatE) or frequency-domain filters (FMLP-Rec) that store
# a conjugate. Real-valued models are not affected. Workaround: `.resolve_conj().resolve_neg()` before the save.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import safetensors
import torch
from safetensors.torch import load_file, save_file

print("safetensors", safetensors.__version__, "torch", torch.__version__)
saved = {"conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(), "imaginary": torch.tensor([1 + 2j, 3 - 4j]).conj()[:1].imag}
print("contiguous:", {name: tensor.is_contiguous() for name, tensor in saved.items()})
save_file(saved, "model.safetensors")
loaded = load_file("model.safetensors")
torch.save(saved, "model.pt")
exact = torch.load("model.pt")
for name, tensor in saved.items():
    print(f"{name}: expected {tensor.tolist()}, torch.save {exact[name].tolist()}, safetensors {loaded[name].tolist()}")
wrong = all(torch.equal(exact[name], tensor) and not torch.equal(loaded[name], tensor) for name, tensor in saved.items())
sys.exit(not wrong)
PYTHON
