#!/usr/bin/env bash
# torchrec 1.8.0: KeyedJaggedTensor.from_jt_dict moves the weights of one feature to another feature.
#
# Expected: a weighted and an unweighted JaggedTensor keep their own weights, or the mixture is refused.
# KeyedJaggedTensor.concat refuses the same mixture: "Can't merge weighted KJT with unweighted KJT". The
# documentation of from_jt_dict has one restriction, the common batch size.
#
# Seen: the weights that exist are concatenated without a gap for features that have none. With an unweighted
# feature first, this feature gets the weights of the second, and the weighted feature has an empty weight
# tensor. No error is raised.
#
# Hurt: models that add weights (watch time, recency) to one of several features: training runs on the wrong
# weights or fails later with a shape error far from the cause. Workaround: give every feature weights, ones if
# it has none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 fbgemm-gpu-cpu==1.8.0 torchmetrics==1.0.3 tensordict==0.15.3 tqdm pyre-extensions numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps torchrec==1.8.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import importlib.metadata
import sys
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

print("torchrec", importlib.metadata.version("torchrec"))
features = {
    "unweighted": JaggedTensor(values=torch.tensor([1, 2]), lengths=torch.tensor([1, 1])),
    "weighted": JaggedTensor(
        values=torch.tensor([3, 4]), lengths=torch.tensor([1, 1]), weights=torch.tensor([10.0, 20.0])),
}
combined = KeyedJaggedTensor.from_jt_dict(features)
seen = {name: combined[name].weights_or_none().tolist() for name in combined.keys()}
print("weights given  {'unweighted': None, 'weighted': [10.0, 20.0]}")
print("weights seen  ", seen, "\nexpected: unchanged, or an error")
try:
    KeyedJaggedTensor.concat([KeyedJaggedTensor.from_jt_dict({name: jagged}) for name, jagged in features.items()])
    refused = False
except ValueError as error:
    refused = True
    print("KeyedJaggedTensor.concat refuses the same features:", error)
sys.exit(not (seen == {"unweighted": [10.0, 20.0], "weighted": []} and refused))
PYTHON
