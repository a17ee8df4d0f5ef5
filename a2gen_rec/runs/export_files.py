"""An exported model's files, written: what is where is told in ``serving/artifact.py``, which reads them."""

import os
from collections.abc import Mapping
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
    ModelSettings,
    duration_feature,
    has_vocabulary,
    vocabulary_file,
)
from a2gen_rec.artifact.quantized_tables import TableDtype, quantize_rows
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.parquet_reader import read_feature_column, read_table
from a2gen_rec.data.schema import RAW_DURATION_COLUMN, DatasetCard
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.runs.row_order import renumber_rows
from a2gen_rec.utils import paths

DICTIONARY_MIN_REPEATS = 50
"""Occurrences of each value of a column, on average, from which a dictionary of them pays."""


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors, unsharded, on the CPU: those that this process has."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if isinstance(value, ShardedTensor):
            whole = torch.empty(value.size(), dtype=value.dtype)
            for shard in value.local_shards():
                at = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
                whole[tuple(slice(begin, begin + size) for begin, size in at)] = shard.tensor.cpu()
            value = whole
        state[name] = value.detach().cpu()
    return state


def write_model(
    folder: Path,
    card: DatasetCard,
    settings: ModelSettings,
    state: Mapping[str, Tensor],
    dtype: TableDtype,
    order: Mapping[str, np.ndarray],
) -> None:
    """Write configuration, card, tables and the dense part.

    Args:
        state: of a ``RankingModel``, whole tensors by name.
        order: of tables whose rows are put in another order, as ``export_rows.row_order`` gives it.
    """
    paths.write_text(str(folder / SETTINGS), yaml.safe_dump(asdict(settings), sort_keys=False))
    card.save(str(folder))
    embedding_tables = EmbeddingTables.from_card(card, settings.model)
    tables: dict[str, Tensor] = {}
    dense = {name: value.contiguous() for name, value in state.items() if name.startswith("ranker.")}
    for name in embedding_tables.rows:
        weight = state[f"embeddings.embeddings.{name}.weight"]
        if name in embedding_tables.full_tables:
            dense[f"table/{name}"] = weight.float().contiguous()
            continue
        for part, stored in quantize_rows(weight, dtype).named_buffers():
            tables[f"{name}/{part}"] = stored[order[name]] if name in order else stored
    save_file(tables, folder / TABLES)
    save_file(dense, folder / DENSE)
    for file in (TABLES, DENSE):  # the library's own files are for their owner alone
        os.chmod(folder / file, 0o644)


def write_vocabularies(folder: Path, dataset: Dataset, order: Mapping[str, np.ndarray]) -> None:
    """Copy what a dataset knows of raw values, in as few bytes as Parquet can; ``order`` as in :func:`write_model`."""
    card = dataset.card
    (folder / "vocabulary").mkdir()
    for feature in card.features:
        if has_vocabulary(feature):
            name = vocabulary_file(feature)
            table = read_table(paths.join(dataset.path, name), ["value", "row"])
            _write_compact(renumber_rows(table, {"row": order[feature.name]}, "row"), folder / name)
    for level, name in ENTITY_TABLES.items():
        file = paths.join(dataset.path, name)
        table = read_table(file)
        features = {feature.name: feature for feature in card.features if feature.level == level}
        for feature in features.values():
            if feature.name in table.column_names:
                read_feature_column(table[feature.name], feature, file)
        kept = [each for each in table.column_names if each in features or each in (level, RAW_DURATION_COLUMN)]
        if RAW_DURATION_COLUMN in kept:
            kept = [each for each in kept if each != duration_feature(card)]
        _write_compact(renumber_rows(table.select(kept), order, IDENTIFIERS[level]), folder / name)


def _write_compact(table: pa.Table, file: Path) -> None:
    """Parquet: dictionaries of values that recur; differences of sorted text, and of integers with hardly two alike."""
    schema = pa.schema([_compact(field) for field in table.schema])
    recurring = [name for name in table.column_names if _recurs(table[name])]
    encodings = {
        field.name: "DELTA_BYTE_ARRAY" if pa.types.is_string(field.type) else "DELTA_BINARY_PACKED"
        for field in schema
        if field.name not in recurring and not pa.types.is_boolean(field.type)
    }
    pq.write_table(
        table.cast(schema), file, compression="zstd", compression_level=9, use_dictionary=recurring,
        column_encoding=encodings, write_statistics=False,
    )  # fmt: skip


def _recurs(column: pa.ChunkedArray) -> bool:
    # Of numbers without order Parquet has no better encoding, and falls back where a dictionary would grow large.
    return pa.types.is_floating(column.type) or DICTIONARY_MIN_REPEATS * pc.count_distinct(column).as_py() <= len(
        column
    )


def _compact(field: pa.Field) -> pa.Field:
    return pa.field(field.name, pa.int32()) if pa.types.is_integer(field.type) else field
