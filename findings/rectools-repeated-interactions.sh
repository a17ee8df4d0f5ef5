#!/usr/bin/env bash
# RecTools 0.19.0: a user who watches one video three times gives Precision@1 = 3 and NDCG@2 = 1.84.
#
# Expected: the documentation of NDCG says that "NDCG@k values lie in [0, 1]", and Precision@k is tp / k, "the
# number of relevant recommendations among first k items". `interactions` is documented as a table with the
# columns user and item, with no demand for unique pairs. The AUC metrics of the same package remove repeated
# pairs themselves.
#
# Seen: the recommendation list is merged with the interactions, so every repetition counts as another
# recommended item. Precision, recall, NDCG and MAP exceed their ranges or move; PAP (an AUC metric) does not.
#
# Hurt: short-video, music and grocery logs, where repeats are normal. A model that recommends what is watched
# again gets more than full marks. Workaround: drop_duplicates on user and item before `calc_metrics`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==1.26.4 pandas==2.3.3 RecTools==0.19.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import pandas as pd
import rectools
from rectools import Columns
from rectools.metrics import MAP, NDCG, PAP, Precision, Recall, calc_metrics

print("RecTools", rectools.__version__)
recommended = pd.DataFrame([[1, 10, 1], [1, 11, 2]], columns=[Columns.User, Columns.Item, Columns.Rank])
metrics = {"precision@1": Precision(1), "ndcg@2": NDCG(2), "recall@2": Recall(2), "map@2": MAP(2), "pap@2": PAP(2)}
values = []
for times in (1, 3):
    watched = pd.DataFrame([[1, 10]] * times + [[1, 12]], columns=[Columns.User, Columns.Item])
    values.append({name: round(float(value), 3) for name, value in calc_metrics(metrics, recommended, watched).items()})
    print(f"video 10 watched {times} times:", values[-1])
print("expected: equal values, precision and NDCG at most 1")
once, thrice = values
above_one = once["precision@1"] == 1 and thrice["precision@1"] == 3 and thrice["ndcg@2"] > 1
sys.exit(not (above_one and once["pap@2"] == thrice["pap@2"]))
PYTHON
