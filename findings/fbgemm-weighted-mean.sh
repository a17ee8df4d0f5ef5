#!/usr/bin/env bash
# fbgemm-gpu-cpu 1.8.0: MEAN pooling with per-sample weights divides by the count, not by the sum of the
# weights.
#
# Expected: a weighted mean, sum(w x) / sum(w), which lies between the pooled rows. torch.nn.EmbeddingBag avoids
# the ambiguity: it raises "per_sample_weights is only supported for mode='sum'".
#
# Seen: SplitTableBatchedEmbeddingBagsCodegen with PoolingMode.MEAN accepts per_sample_weights and returns sum(w
# x) / n. Rows of constant 1 and weights 3 and 1 give 2: outside the range of the rows.
#
# Hurt: ports of a torch model to the fused table, and weights by recency or watch time. The scale of the pooled
# embedding depends on the scale of the weights. Workaround: normalize the weights in each bag and pool with
# SUM.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 fbgemm-gpu-cpu==1.8.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import importlib.metadata
import sys
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice, EmbeddingLocation, PoolingMode, SplitTableBatchedEmbeddingBagsCodegen)

print("fbgemm-gpu-cpu", importlib.metadata.version("fbgemm-gpu-cpu"))
ids, offsets, weights = torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([3.0, 1.0])
table = SplitTableBatchedEmbeddingBagsCodegen(
    [(10, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)], pooling_mode=PoolingMode.MEAN)
table.init_embedding_weights_uniform(1.0, 1.0)
pooled = table(ids, offsets, per_sample_weights=weights)
print("rows of 1, weights 3 and 1: expected 1.0 (weighted mean), seen", pooled.tolist())
try:
    torch.nn.EmbeddingBag(10, 4, mode="mean")(ids, offsets[:1], per_sample_weights=weights)
    refused = False
except NotImplementedError as error:
    refused = True
    print("torch.nn.EmbeddingBag refuses:", str(error).split(". ")[0])
sys.exit(not (refused and torch.equal(pooled.detach(), torch.full((1, 4), 2.0))))
PYTHON
