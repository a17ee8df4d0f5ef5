"""Candidate items of a prepared dataset."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from a2gen_rec.data.columns import CandidateItems
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.parquet_reader import read_feature_column, read_table
from a2gen_rec.data.schema import ITEM_ID
from a2gen_rec.errors import DataError


def find_candidate_items(dataset: Dataset, ids: Sequence[str]) -> CandidateItems:
    """Table rows of raw item identifiers; row 0 of every item feature for those the dataset does not have.

    Raises:
        DataError: ``items.parquet`` is not there or breaks its contract.
    """
    wanted = pa.array(ids, pa.string())
    table = _read_items(dataset, pc.field("item").isin(wanted))
    place = pc.index_in(wanted, table["item"].combine_chunks())
    known = place.is_valid().to_numpy(zero_copy_only=False)
    at = place.filter(place.is_valid()).to_numpy()
    rows = {}
    for feature in dataset.card.features_at("item"):
        rows[feature.name] = np.zeros(len(ids), np.int64)
        rows[feature.name][known] = table[feature.name].to_numpy()[at]
    return CandidateItems(list(ids), known, rows)


def popular_items(dataset: Dataset, count: int) -> CandidateItems:
    """The ``count`` items shown most in training, most shown first.

    Raises:
        DataError: ``item_statistics.parquet`` or ``items.parquet`` is not there or breaks its contract.
    """
    file = dataset.item_statistics_file
    shown = read_table(file, [ITEM_ID, "impressions"], pc.field(ITEM_ID) > 0)  # row 0 is many items, not one
    most = shown.sort_by([("impressions", "descending"), (ITEM_ID, "ascending")])[ITEM_ID].combine_chunks()[:count]
    table = _read_items(dataset, pc.field(ITEM_ID).isin(most))
    # Hashed items may share a row: they keep their order in the file.
    order = np.argsort(pc.index_in(table[ITEM_ID].combine_chunks(), most).to_numpy(), kind="stable")[:count]
    if not len(order):
        raise DataError("no item with training impressions to rank by default; give --candidates", file=file)
    table = table.take(order)
    rows = {feature.name: table[feature.name].to_numpy() for feature in dataset.card.features_at("item")}
    return CandidateItems(table["item"].to_pylist(), np.ones(len(order), bool), rows)


def _read_items(dataset: Dataset, filters: pc.Expression) -> pa.Table:
    """Rows of ``items.parquet``, their ids checked against the card."""
    file = dataset.items_file
    features = dataset.card.features_at("item")
    table = read_table(file, ["item", *(feature.name for feature in features)], filters)
    for feature in features:
        read_feature_column(table[feature.name], feature, file)
    return table
