"""Candidate items of a prepared dataset."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from a2gen_rec.data.bag_sql import WEIGHTS_COLUMN
from a2gen_rec.data.bags import Bags
from a2gen_rec.data.columns import CandidateItems
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.parquet_reader import read_bags, read_feature_column, read_numbers, read_statistics, read_table
from a2gen_rec.data.schema import ITEM_ID, STATISTICS_COLUMN, Feature
from a2gen_rec.errors import DataError


def find_candidate_items(dataset: Dataset, ids: Sequence[str]) -> CandidateItems:
    """Return table rows of raw item identifiers; row 0 of every item feature for unknown items.

    Raises:
        DataError: ``items.parquet`` is missing or invalid.
    """
    query = pa.array(ids, pa.string())
    table = _read_items(dataset, pc.field("item").isin(query))
    table_index = pc.index_in(query, table["item"].combine_chunks())
    is_known = table_index.is_valid().to_numpy(zero_copy_only=False)
    known_index = table_index.filter(table_index.is_valid()).to_numpy()
    rows = {}
    bags = {}
    for feature in dataset.card.features_at("item"):
        if feature.multi_valued:
            known = Bags.concat([read_bags(table, feature, dataset.items_file, dataset.new_rows), Bags.unknown(1)])
            index = np.full(len(ids), len(known) - 1)
            index[is_known] = known_index
            bags[feature.name] = known[index]
            continue
        rows[feature.name] = np.zeros(len(ids), np.int64)
        rows[feature.name][is_known] = _rows(dataset, table, feature)[known_index]
    statistics = np.zeros((len(ids), len(dataset.card.statistics)), np.float16)
    statistics[is_known] = _statistics(dataset, table)[known_index]
    numbers = np.full((len(ids), len(dataset.card.numbers_at("item"))), np.nan, np.float32)
    numbers[is_known] = _numbers(dataset, table)[known_index]
    return CandidateItems(list(ids), is_known, rows, statistics, numbers, bags, _indices(dataset, query))


def popular_items(dataset: Dataset, count: int) -> CandidateItems:
    """Return the ``count`` items with the most training impressions, in descending order.

    Raises:
        DataError: ``item_statistics.parquet`` or ``items.parquet`` is missing or invalid.
    """
    file = dataset.item_statistics_file
    statistics = read_table(file, [ITEM_ID, "impressions"], pc.field(ITEM_ID) > 0)  # row 0 aggregates unknown items
    popular = statistics.sort_by([("impressions", "descending"), (ITEM_ID, "ascending")])[ITEM_ID].combine_chunks()[
        :count
    ]
    table = _read_items(dataset, pc.field(ITEM_ID).isin(popular))
    # Hashed items can share a row; they keep their order in the file.
    order = np.argsort(pc.index_in(table[ITEM_ID].combine_chunks(), popular).to_numpy(), kind="stable")[:count]
    if not len(order):
        raise DataError("no item has training impressions; pass --candidates", file=file)
    table = table.take(order)
    features = dataset.card.features_at("item")
    rows = {feature.name: _rows(dataset, table, feature) for feature in features if not feature.multi_valued}
    bags = {x.name: read_bags(table, x, dataset.items_file, dataset.new_rows) for x in features if x.multi_valued}
    is_known = np.ones(len(order), bool)
    statistics_of_items, numbers = _statistics(dataset, table), _numbers(dataset, table)
    index = _indices(dataset, table["item"].combine_chunks())
    return CandidateItems(table["item"].to_pylist(), is_known, rows, statistics_of_items, numbers, bags, index)


def _rows(dataset: Dataset, items: pa.Table, feature: Feature) -> np.ndarray:
    """Return [items] table rows that the model knows."""
    return dataset.new_rows.mask(feature.name, items[feature.name].to_numpy())


def _statistics(dataset: Dataset, items: pa.Table) -> np.ndarray:
    """Return [items, statistics] float16 of rows of ``items.parquet``."""
    count = len(dataset.card.statistics)
    if not count:
        return np.zeros((len(items), 0), np.float16)
    return read_statistics(items[STATISTICS_COLUMN], count, dataset.items_file)


def _indices(dataset: Dataset, ids: pa.Array) -> np.ndarray | None:
    """Return [items] rows of ``items.parquet``, -1 for unknown items; None without vectors."""
    if not dataset.card.vectors:
        return None
    items = read_table(dataset.items_file, ["item"])["item"].combine_chunks()
    return pc.fill_null(pc.index_in(ids, items), -1).to_numpy().astype(np.int64)


def _numbers(dataset: Dataset, items: pa.Table) -> np.ndarray:
    """Return [items, item numbers] float32 of rows of ``items.parquet``."""
    return read_numbers(items, dataset.card.numbers_at("item"), dataset.items_file)


def _read_items(dataset: Dataset, filters: pc.Expression) -> pa.Table:
    """Read rows of ``items.parquet`` and check their ids against the card."""
    file = dataset.items_file
    features = dataset.card.features_at("item")
    statistics = [STATISTICS_COLUMN] if dataset.card.statistics else []
    names = [*(feature.name for feature in features), *(number.name for number in dataset.card.numbers_at("item"))]
    names += [WEIGHTS_COLUMN + feature.name for feature in features if feature.weighted]
    table = read_table(file, ["item", *names, *statistics], filters)
    for feature in features:
        if not feature.multi_valued:
            read_feature_column(table[feature.name], feature, file, dataset.new_rows)
    return table
