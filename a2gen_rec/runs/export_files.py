"""Writer of an exported model's files; :mod:`a2gen_rec.artifact.artifact` describes and reads them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from a2gen_rec.artifact.artifact import (
    DENSE,
    ENTITY_TABLES,
    IDENTIFIERS,
    SETTINGS,
    TABLES,
    VECTORS,
    ModelSettings,
    duration_feature,
    has_vocabulary,
    vocabulary_file,
)
from a2gen_rec.artifact.quantized_tables import TableDtype, check_representable, quantize_rows
from a2gen_rec.data.bag_sql import WEIGHTS_COLUMN
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.data.parquet_reader import read_bags, read_feature_column, read_table
from a2gen_rec.data.schema import ITEM_INDEX, RAW_DURATION_COLUMN, STATISTICS_COLUMN, Feature
from a2gen_rec.errors import UserError
from a2gen_rec.models.embedding_tables import EmbeddingTables, module_key
from a2gen_rec.runs.row_order import renumber_rows, without_new_rows
from a2gen_rec.utils import paths

DICTIONARY_MIN_REPEATS = 50
"""Minimum average number of occurrences per value for dictionary encoding of a column."""


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors unsharded on the CPU, from the shards of this process."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if isinstance(value, ShardedTensor):
            full = torch.empty(value.size(), dtype=value.dtype)
            for shard in value.local_shards():
                ranges = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
                full[tuple(slice(start, start + size) for start, size in ranges)] = shard.tensor.cpu()
            value = full
        state[name] = value.detach().cpu()
    return state


def write_model(
    folder: Path,
    card: DatasetCard,
    settings: ModelSettings,
    state: Mapping[str, Tensor],
    dtype: TableDtype,
    permutation: Mapping[str, np.ndarray],
) -> None:
    """Write settings, card, tables and the dense model.

    Args:
        folder: Output directory.
        card: Dataset card.
        settings: Settings of the model.
        state: Full tensors of a :class:`RankingModel` by name.
        dtype: Data type of the tables looked up by id.
        permutation: Table -> row permutation, from :func:`export_permutation`.

    Raises:
        UserError: A parameter is not finite, or out of the range of ``dtype``.
    """
    paths.write_text(str(folder / SETTINGS), yaml.safe_dump(asdict(settings), sort_keys=False))
    card.save(str(folder))
    embedding_tables = EmbeddingTables.from_card(card, settings.model)
    tables: dict[str, Tensor] = {}
    dense = {name: value.contiguous() for name, value in state.items() if name.startswith("ranker.")}
    for name, value in dense.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"parameter {name!r} is not finite; the training has diverged")
    for name in embedding_tables.rows:
        weight = state[f"embeddings.embeddings.{module_key(name)}.weight"]
        check_representable(name, weight, "fp32" if name in embedding_tables.full_tables else dtype)
        if name in embedding_tables.full_tables:
            dense[f"table/{name}"] = weight.float().contiguous()
            continue
        for part, stored in quantize_rows(weight, dtype).named_buffers():
            tables[f"{name}/{part}"] = stored[permutation[name]] if name in permutation else stored
    save_file(tables, folder / TABLES)
    save_file(dense, folder / DENSE)
    for file in (TABLES, DENSE):  # safetensors creates files readable by their owner only
        os.chmod(folder / file, 0o644)


def write_vocabularies(
    folder: Path, dataset: Dataset, permutation: Mapping[str, np.ndarray], dtype: TableDtype = "int8"
) -> None:
    """Copy vocabularies and entity tables of a dataset to compact Parquet files.

    Args:
        folder: Output directory.
        dataset: Prepared dataset.
        permutation: As in :func:`write_model`.
        dtype: Data type of the vectors.
    """
    card = dataset.card
    (folder / "vocabulary").mkdir()
    for feature in card.features:
        if has_vocabulary(feature):
            name = vocabulary_file(feature)
            table = without_new_rows(dataset, feature, read_table(paths.join(dataset.path, name), ["value", "row"]))
            _write_compact(renumber_rows(table, {"row": permutation[feature.name]}, "row"), folder / name)
    for level, name in ENTITY_TABLES.items():
        file = paths.join(dataset.path, name)
        features = {feature.name: feature for feature in card.features if feature.level == level}
        table = _known_rows(read_table(file), features.values(), file, dataset.new_rows)
        weights = (WEIGHTS_COLUMN + name for name, feature in features.items() if feature.weighted)
        numbers = (number.name for number in card.numbers if number.level == level)
        exported = {*features, *weights, *numbers, level, RAW_DURATION_COLUMN, STATISTICS_COLUMN}
        columns = [column for column in table.column_names if column in exported]
        if RAW_DURATION_COLUMN in columns:
            columns = [column for column in columns if column != duration_feature(card)]
        selected = table.select(columns).append_column(ITEM_INDEX, pa.array(np.arange(len(table))))
        exported_table = renumber_rows(selected, permutation, IDENTIFIERS[level])
        _write_compact(exported_table.drop_columns([ITEM_INDEX]), folder / name)
        if level == "item" and card.vectors:
            write_vectors(folder, dataset, exported_table[ITEM_INDEX].to_numpy(), dtype)


def _known_rows(table: pa.Table, features: Iterable[Feature], file: str, new_rows: NewRows) -> pa.Table:
    """Return an entity table without the rows that the model does not know, after a check of its rows."""
    for feature in features:
        columns: dict[str, pa.Array] = {}
        if feature.multi_valued:
            bags = read_bags(table, feature, file, new_rows)
            ends = pa.array(np.append(0, np.cumsum(bags.lengths)).astype(np.int32))
            columns[feature.name] = pa.ListArray.from_arrays(ends, pa.array(bags.ids))
            if feature.weighted:
                columns[WEIGHTS_COLUMN + feature.name] = pa.ListArray.from_arrays(ends, pa.array(bags.weights))
        elif feature.name in table.column_names:
            columns[feature.name] = pa.array(read_feature_column(table[feature.name], feature, file, new_rows))
        if new_rows.has(feature.name):
            for name, column in columns.items():
                table = table.set_column(table.column_names.index(name), name, column)
    return table


def write_vectors(folder: Path, dataset: Dataset, order: np.ndarray, dtype: TableDtype) -> None:
    """Write the vectors of the items in the order [items] of the exported item file."""
    tensors: dict[str, Tensor] = {}
    for name, table in dataset.open_vectors().items():
        values = torch.from_numpy(np.asarray(table.values)[order])
        # Float16 is the precision of a dataset. An item without a vector has the scale NaN.
        stored = quantize_rows(values, "fp16" if dtype == "fp32" else dtype)
        tensors |= {f"{name}/{part}": tensor for part, tensor in stored.named_buffers()}
    save_file(tensors, folder / VECTORS)
    os.chmod(folder / VECTORS, 0o644)


def _write_compact(table: pa.Table, file: Path) -> None:
    """Write Parquet with dictionaries for recurring values and delta encoding for sorted text and distinct integers."""
    schema = pa.schema([_compact_field(field) for field in table.schema])
    table = table.cast(schema)
    recurring = [name for name in table.column_names if _use_dictionary(table[name])]
    encodings = {
        field.name: "DELTA_BYTE_ARRAY" if pa.types.is_string(field.type) else "DELTA_BINARY_PACKED"
        for field in schema
        if field.name not in recurring and (pa.types.is_integer(field.type) or pa.types.is_string(field.type))
    }
    pq.write_table(
        table, file, compression="zstd", compression_level=9, use_dictionary=recurring,
        column_encoding=encodings, write_statistics=False,
    )  # fmt: skip


def _use_dictionary(column: pa.ChunkedArray) -> bool:
    if pa.types.is_list(column.type):
        return False
    if pa.types.is_floating(column.type):  # no better Parquet encoding; large dictionaries fall back to plain
        return True
    return DICTIONARY_MIN_REPEATS * pc.count_distinct(column).as_py() <= len(column)


def _compact_field(field: pa.Field) -> pa.Field:
    if field.name == STATISTICS_COLUMN:  # read as half precision everywhere
        return pa.field(field.name, pa.list_(pa.float16()))
    if pa.types.is_list(field.type):
        return pa.field(field.name, pa.list_(_compact_field(field.type.value_field)))
    return pa.field(field.name, pa.int32()) if pa.types.is_integer(field.type) else field
