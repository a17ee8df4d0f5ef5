#!/usr/bin/env bash
# torchmetrics 1.9.0: MRR, MAP, precision and recall drop every positive whose score is 0 or below.
#
# Expected: a ranking metric depends on the order of the scores only. The documentation of RetrievalMRR asks for
# `preds`, "a float tensor", with no range. Adding a constant to all scores must not change the value. Version
# 1.0.3 agrees.
#
# Seen: `target = torch.where(preds > 0, target, 0)` runs before the sort in four metrics (pull request 3104 of
# Lightning-AI/torchmetrics, "Discard zero and negative predictions in retrieval metrics"). A perfect list of
# logits below zero has MRR, MAP and recall 0. HitRate, NDCG and R-precision of the same list stay 1.
#
# Hurt: every ranker that emits logits, log-probabilities or dot products. A model whose bias moves the logits
# down loses recall at equal order. Workaround: apply a strictly positive, increasing function such as exp or
# sigmoid first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import torch
import torchmetrics
from torchmetrics import retrieval

print("torchmetrics", torchmetrics.__version__)
logits = torch.tensor([-3.0, -0.5, -2.0, -1.0])
target = torch.tensor([0, 1, 0, 1])  # both positives rank first
query = torch.zeros(4, dtype=torch.long)
names = ["RetrievalMRR", "RetrievalMAP", "RetrievalRecall", "RetrievalPrecision",
         "RetrievalHitRate", "RetrievalNormalizedDCG", "RetrievalRPrecision"]
seen = {}
for name in names:
    metric = getattr(retrieval, name)
    seen[name] = (metric()(logits, target, indexes=query).item(), metric()(logits.exp(), target, indexes=query).item())
    print(f"{name:24} logits {seen[name][0]:.2f}   exp(logits) {seen[name][1]:.2f}   expected: equal")
dropped = [name for name, (raw, positive) in seen.items() if raw == 0 and positive > 0]
sys.exit(dropped != names[:4])
PYTHON
