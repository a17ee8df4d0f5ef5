#!/usr/bin/env bash
# ir-measures 0.4.3 (with pytrec_eval-terrier 0.5.11): one call orders tied scores in two opposite ways.
#
# Expected: all measures of one call to `calc_aggregate` describe the same ranking of the run. The README
# promises "a common interface to many IR measure tools".
#
# Seen: RR@k is computed by the `msmarco` provider, which keeps tied documents in the order of the input. RR,
# nDCG@k, AP@k and P@k are computed by trec_eval, which sorts ties by descending document id. For three tied
# candidates RR@5 is 1.0 and RR is 1/3 in the same dictionary, although a cutoff can only lower a reciprocal
# rank.
#
# Hurt: evaluations of models with few distinct scores (popularity, constant, quantized or clipped scores).
# MRR@10 looks excellent because positives were appended first, while NDCG@10 in the next column shows the
# opposite. Workaround: break ties before the call, or average over orders.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==1.26.4 ir-measures==0.4.3 pytrec_eval-terrier==0.5.11
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import ir_measures
from ir_measures import AP, RR, P, nDCG

print("ir-measures", ir_measures.__version__)
run = {"user": {"a": 0.5, "b": 0.5, "c": 0.5}}
values = {}
for positive in "abc":
    measured = ir_measures.calc_aggregate([RR, RR @ 5, nDCG @ 5, AP @ 5, P @ 1], {"user": {positive: 1}}, run)
    values[positive] = {str(measure): round(value, 4) for measure, value in measured.items()}
    print("positive", positive, values[positive])
print("expected: RR@5 <= RR, since a cutoff only removes candidates; seen: RR@5 = 1 with RR = 1/3 for candidate a")
first, last = values["a"], values["c"]
sys.exit(not (first["RR@5"] == 1 and first["RR"] == 0.3333 and last["RR@5"] == 0.3333 and last["RR"] == 1))
PYTHON
