#!/usr/bin/env bash
# pytrec_eval-terrier 0.5.11: scores are stored as float32; distinct float64 scores become ties, and ties go by
# id.
#
# Expected: a Python run holds float64 scores, so 2e-46 ranks above 1e-46 and 1 + 1e-9 above 1. The README asks
# for a run of type dict[str, dict[str, float]] and mentions no precision.
#
# Seen: trec_eval keeps `float sim`. Both pairs become ties, and trec_eval sorts ties by descending document id.
# A reciprocal rank depends on the name of the item: 0.5 for a better item "a", 1.0 for a better item "z".
#
# Hurt: scores of a fusion formula with products of many probabilities (ten probabilities of 1e-5 give 1e-50,
# which is 0 in float32), and scores with a large common offset. Popularity, time or age often hides in the ids,
# so the tie order is not neutral. Workaround: pass ranks, or logarithms without a common offset.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==1.26.4 pytrec_eval-terrier==0.5.11
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import importlib.metadata
import sys
import pytrec_eval

print("pytrec_eval-terrier", importlib.metadata.version("pytrec_eval-terrier"))
seen = []
for name, high, low in (("product of ten probabilities", 2e-50, 1e-50), ("common offset", 1 + 1e-9, 1.0)):
    for better, worse in (("a", "z"), ("z", "a")):
        evaluator = pytrec_eval.RelevanceEvaluator({"user": {better: 1}}, {"recip_rank"})
        value = evaluator.evaluate({"user": {better: high, worse: low}})["user"]["recip_rank"]
        seen.append(value)
        print(f"{name}: positive {better!r} {high!r} above {worse!r} {low!r}: expected 1.0, seen {value}")
sys.exit(seen != [0.5, 1.0, 0.5, 1.0])
PYTHON
