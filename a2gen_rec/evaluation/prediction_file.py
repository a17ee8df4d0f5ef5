"""Predictions of a split in one Parquet file, for metrics and their uncertainty.

One row per target: ``user`` (key), ``ts_ms`` (start), ``user_row``, ``item`` and ``duration_bucket`` (table rows),
``probability_NAME`` and ``occurred_NAME`` of every outcome, ``time_NAME``, ``observed_time_NAME`` and
``time_given_prefix_NAME`` of every action in log1p seconds, ``watch_time``, ``unexplored_mass``, and ``oracle_NAME``
for true probabilities of a simulated log; see :class:`Predictions`. The schema metadata lists the outcomes in order.
Match files of two models by user and time, not by row.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.parquet_reader import read_table
from a2gen_rec.errors import DataError
from a2gen_rec.evaluation.predict import Predictions, outcome_columns
from a2gen_rec.utils import paths

_NAMES = b"a2gen_predictions"
# Field of Predictions, also the prefix of its columns -> kind of names.
_MATRICES = {
    "probability": "outcomes",
    "occurred": "outcomes",
    "time": "actions",
    "observed_time": "actions",
    "time_given_prefix": "actions",
    "oracle": "oracle",
}
_COLUMNS = ("user", "ts_ms", "user_row", "item", "duration_bucket", "watch_time", "unexplored_mass")


def write_predictions(file: str, predictions: Predictions, card: DatasetCard) -> None:
    """Write the predictions of a split as :func:`paths.atomic_writer`.

    Raises:
        UserError: The file cannot be written.
    """
    names = {"outcomes": list(outcome_columns(card)), "actions": card.actions[1:], "oracle": card.oracle_columns}
    columns = {name: getattr(predictions, name) for name in _COLUMNS}
    for field, kind in _MATRICES.items():
        values = getattr(predictions, field)
        columns |= {f"{field}_{name}": values[:, column] for column, name in enumerate(names[kind])}
    table = pa.table(columns).replace_schema_metadata({_NAMES: json.dumps(names)})
    with paths.atomic_writer(file) as stream:
        pq.write_table(table, stream, compression="zstd")


def read_predictions(file: str) -> tuple[Predictions, list[str]]:
    """Read predictions written by :func:`write_predictions`.

    Returns:
        Predictions, and the names of their outcomes, actions first.

    Raises:
        DataError: The file is missing, unreadable or not a prediction file.
    """
    table = read_table(file)
    metadata = table.schema.metadata or {}
    if _NAMES not in metadata:
        raise DataError("not a prediction file; `a2gen evaluate --predictions` writes one", file=file)
    names = json.loads(metadata[_NAMES])
    expected = [*_COLUMNS, *(f"{field}_{name}" for field, kind in _MATRICES.items() for name in names[kind])]
    if missing := [name for name in expected if name not in table.column_names]:
        raise DataError(
            "column is missing; rerun `a2gen evaluate --predictions` with this version", file=file, field=missing[0]
        )

    def matrix(field: str, kind: str) -> np.ndarray:
        columns = [table[f"{field}_{name}"].to_numpy() for name in names[kind]]
        return np.stack(columns, axis=1) if columns else np.zeros((len(table), 0), np.float32)

    columns = {name: table[name].to_numpy() for name in _COLUMNS}
    matrices = {field: matrix(field, kind) for field, kind in _MATRICES.items()}
    return Predictions(**columns, **matrices), names["outcomes"]
