"""Predictions of a split as one Parquet file, from which metrics and their uncertainty can be made later.

One row per target: ``user`` (its key), ``item`` and ``length`` (table rows), ``probability_NAME`` and ``happened_NAME``
of every outcome, ``time_NAME``, ``actual_time_NAME`` and ``next_time_NAME`` of every action in log1p seconds,
``watch_time``, ``remainder``, and ``oracle_NAME`` of a simulated log's true probabilities; see :class:`Predictions`.
The schema's metadata name the outcomes in order. What belongs together in two models' files is the user, not the row.
"""

import json
import os
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from iopath.common.file_io import g_pathmgr

from a2gen_rec.data.parquet_reader import read_table
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.evaluation.predict import Predictions, outcome_columns
from a2gen_rec.utils import paths

_NAMES = b"a2gen_predictions"
# Fields of Predictions with a column per name, and what their columns begin with.
_MATRICES = {
    "probability": "outcomes",
    "occurred": "outcomes",
    "time": "actions",
    "observed_time": "actions",
    "time_given_prefix": "actions",
    "oracle": "oracle",
}
_COLUMNS = ("user", "item", "duration_bucket", "watch_time", "unexplored_mass")


def write_predictions(file: str, predictions: Predictions, card: DatasetCard) -> None:
    """Write the predictions of a split; a local file is written beside and moved into place.

    Raises:
        UserError: the place is not writable.
    """
    names = {"outcomes": list(outcome_columns(card)), "actions": card.actions[1:], "oracle": card.oracle_columns}
    columns = {name: getattr(predictions, name) for name in _COLUMNS}
    for field, kind in _MATRICES.items():
        values = getattr(predictions, field)
        columns |= {f"{field}_{name}": values[:, column] for column, name in enumerate(names[kind])}
    table = pa.table(columns).replace_schema_metadata({_NAMES: json.dumps(names)})
    beside = f"{file}.writing" if paths.is_local(file) else file
    try:
        with g_pathmgr.open(beside, "wb") as stream:
            pq.write_table(table, stream, compression="zstd")
        if beside != file:
            os.replace(beside, file)
    except OSError as error:
        if beside != file:
            with suppress(OSError):
                os.remove(beside)
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error


def read_predictions(file: str) -> tuple[Predictions, list[str]]:
    """Predictions written by :func:`write_predictions`, and the names of their outcomes, actions first.

    Raises:
        DataError: it is not there, or no such file.
    """
    table = read_table(file)
    metadata = table.schema.metadata or {}
    if _NAMES not in metadata:
        raise DataError("holds no predictions; `a2gen evaluate --predictions` writes them", file=file)
    names = json.loads(metadata[_NAMES])
    wanted = [*_COLUMNS, *(f"{field}_{name}" for field, kind in _MATRICES.items() for name in names[kind])]
    if lacking := [name for name in wanted if name not in table.column_names]:
        raise DataError(
            "is missing; `a2gen evaluate --predictions` of this version writes it", file=file, field=lacking[0]
        )

    def matrix(field: str, kind: str) -> np.ndarray:
        found = [table[f"{field}_{name}"].to_numpy() for name in names[kind]]
        return np.stack(found, axis=1) if found else np.zeros((len(table), 0), np.float32)

    columns = {name: table[name].to_numpy() for name in _COLUMNS}
    matrices = {field: matrix(field, kind) for field, kind in _MATRICES.items()}
    return Predictions(**columns, **matrices), names["outcomes"]
