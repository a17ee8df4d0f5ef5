"""An exported model on disk: all that ranking needs, in open formats, reading which runs no code.

::

    manifest.json               what is here: see ``manifest.py``
    model.yaml                  the model's configuration, and how sequences are followed
    dataset.yaml                the dataset card: features, buckets, rules
    tables.safetensors          tables looked up by id: NAME/values and, of int8 codes, NAME/scale
    dense.safetensors           everything after the lookups (ranker/…), and small tables that are looked up whole
    vocabulary/FEATURE.parquet  raw ``value`` to table ``row``, identifiers aside
    users.parquet, items.parquet   raw identifiers and the rows of their features
    ensemble/                   as ``models/ensemble_store.py`` has it; absent without one
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from a2gen_rec import paths
from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.columns import read_table
from a2gen_rec.data.schema import ITEM, RAW_LENGTH, DatasetCard, Feature
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.models.ensemble import Ensemble
from a2gen_rec.models.ensemble_store import EnsembleCard, load_ensemble
from a2gen_rec.models.named import ranker_kind
from a2gen_rec.models.ranker import Encoded, Ranker
from a2gen_rec.serving.catalogue import Catalogue
from a2gen_rec.serving.manifest import Manifest, read_manifest
from a2gen_rec.serving.tables import Table, Tables, TableType, quantised
from a2gen_rec.sharding.tables import looked_up, table_rows, whole_tables

SETTINGS, TABLES, DENSE = "model.yaml", "tables.safetensors", "dense.safetensors"
USERS, ITEMS, ENSEMBLE = "users.parquet", "items.parquet", "ensemble"
CURRENT = "CURRENT"
"""A file in a folder of models that names the one to serve."""
IDENTIFIERS = {"user": "user_id", "item": ITEM}


@dataclass(frozen=True)
class Settings:
    """How the model is made and read.

    Attributes:
        max_error, group_cost: as in ``EvaluateConfig`` and ``LoaderConfig``.
    """

    model: ModelConfig
    max_error: float
    group_cost: int


class ExportedModel(nn.Module):
    """Stored tables and the ranker on top, in the place of a ``RankingModel``."""

    def __init__(self, embeddings: Tables, ranker: Ranker[Any]) -> None:
        super().__init__()
        self.embeddings, self.ranker = embeddings, ranker

    def forward(self, batch: WindowBatch) -> Encoded:
        encoded: Encoded = self.ranker(self.embeddings(batch.sparse), batch)
        return encoded


@dataclass(frozen=True)
class Artifact:
    """An exported model in memory.

    Attributes:
        model: ready to predict, on the CPU.
        vocabularies: vocabulary feature -> raw value -> row; identifiers are in ``users`` and ``items``.
    """

    manifest: Manifest
    settings: Settings
    card: DatasetCard
    model: ExportedModel
    fused: tuple[Ensemble, EnsembleCard] | None
    users: Catalogue
    items: Catalogue
    vocabularies: dict[str, dict[str, int]]


def write_model(
    folder: Path, card: DatasetCard, settings: Settings, state: Mapping[str, Tensor], dtype: TableType
) -> None:
    """Write configuration, card, tables and the dense part.

    Args:
        state: of a ``RankingModel``, whole tensors by name.
    """
    paths.write_text(str(folder / SETTINGS), yaml.safe_dump(asdict(settings), sort_keys=False))
    card.save(str(folder))
    small = whole_tables(card, settings.model)
    tables: dict[str, Tensor] = {}
    dense = {name: value.contiguous() for name, value in state.items() if name.startswith("ranker.")}
    for name in table_rows(card, settings.model):
        weight = state[f"embeddings.embeddings.{name}.weight"]
        if name in small:
            dense[f"table/{name}"] = weight.float().contiguous()
            continue
        table = quantised(weight, dtype)
        tables[f"{name}/values"] = table.values
        if table.scale is not None:
            tables[f"{name}/scale"] = table.scale
    save_file(tables, folder / TABLES)
    save_file(dense, folder / DENSE)
    for file in (TABLES, DENSE):  # the library's own files are for their owner alone
        os.chmod(folder / file, 0o644)


def write_vocabularies(folder: Path, dataset: str, card: DatasetCard) -> None:
    """Copy what a dataset knows of raw values, in as few bytes as Parquet can."""
    (folder / "vocabulary").mkdir()
    for feature in card.features:
        if _has_vocabulary(feature):
            name = f"vocabulary/{feature.name}.parquet"
            table = read_table(paths.join(dataset, *name.split("/")), ["value", "row"])
            _write_compact(table, folder / name)
    for level, name in (("user", USERS), ("item", ITEMS)):
        features = {feature.name for feature in card.features if feature.level == level}
        table = read_table(paths.join(dataset, name))
        kept = [each for each in table.column_names if each in features or each in (level, RAW_LENGTH)]
        _write_compact(table.select(kept), folder / name)


def model_folder(model: str) -> str:
    """The folder that a path leads to now: through links, and through a folder's ``CURRENT``.

    Raises:
        UserError: ``CURRENT`` names none.
    """
    pointer = paths.join(model, CURRENT)
    if paths.exists(pointer):
        name = paths.read_text(pointer).strip()
        if not name or "/" in name or name in (".", ".."):
            raise UserError(f"{pointer}: must hold the name of a folder beside it")
        model = paths.join(model, name)
    return os.path.realpath(model) if paths.is_local(model) else model


def load_artifact(folder: str) -> Artifact:
    """Read and check an exported model.

    Raises:
        UserError: a file is missing, truncated or damaged, does not fit the others, or the format is newer.
    """
    manifest = read_manifest(folder)
    settings, card = _read_settings(paths.join(folder, SETTINGS)), DatasetCard.load(folder)
    model = _read_model(folder, card, settings)
    fused = load_ensemble(paths.join(folder, ENSEMBLE)) if f"{ENSEMBLE}/ensemble.yaml" in manifest.files else None
    return Artifact(
        manifest=manifest,
        settings=settings,
        card=card,
        model=model,
        fused=fused,
        users=Catalogue.read(paths.join(folder, USERS), "user", card.at_level("user")),
        items=Catalogue.read(paths.join(folder, ITEMS), "item", card.at_level("item")),
        vocabularies={
            feature.name: _read_vocabulary(paths.join(folder, "vocabulary", f"{feature.name}.parquet"), feature)
            for feature in card.features
            if _has_vocabulary(feature)
        },
    )


def _has_vocabulary(feature: Feature) -> bool:
    return feature.kind == "vocabulary" and IDENTIFIERS.get(feature.level) != feature.name


def _read_settings(file: str) -> Settings:
    try:
        raw = paths.read_yaml(file)
        return Settings(**{**raw, "model": ModelConfig(**raw["model"])})
    except (TypeError, KeyError, ConfigError) as error:
        raise UserError(f"{file}: not a model's configuration that this version reads ({error})") from error


def _read_model(folder: str, card: DatasetCard, settings: Settings) -> ExportedModel:
    ranker = ranker_kind(settings.model)(card, settings.model)
    try:
        file = paths.join(folder, DENSE)
        dense = _read_tensors(file)
        ranker.load_state_dict(
            {name.removeprefix("ranker."): value for name, value in dense.items() if name.startswith("ranker.")}
        )
        whole = {name: dense[f"table/{name}"] for name in whole_tables(card, settings.model)}
        file = paths.join(folder, TABLES)
        stored = _read_tensors(file)
        tables = {
            feature.name: Table(stored[f"{feature.name}/values"], stored.get(f"{feature.name}/scale"))
            for feature in looked_up(card)
        }
        for feature in looked_up(card):
            if tables[feature.name].values.shape != (feature.cardinality, settings.model.dim):
                raise UserError(f"{file}: table {feature.name!r} is not of the dataset card's size")
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{file}: does not fit the model or is damaged ({lines[-1] if lines else error})") from error
    return ExportedModel(Tables(tables, whole), ranker).eval()


def _read_tensors(file: str) -> dict[str, Tensor]:
    """All tensors of a file, copied one by one: the library's are the file itself, whatever is done to it later."""
    with safe_open(paths.local_copy(file), "pt") as stored:
        return {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118


def _read_vocabulary(file: str, feature: Feature) -> dict[str, int]:
    table = read_table(file, ["value", "row"])
    rows = table["row"].to_pylist()
    if not all(0 < row < feature.cardinality for row in rows):
        raise DataError(f"row is not in [1, {feature.cardinality})", file=file, field="row")
    return dict(zip(table["value"].to_pylist(), rows, strict=True))


def _write_compact(table: pa.Table, file: Path) -> None:
    """Parquet of sorted text and of integers with hardly two alike: differences, where dictionaries only add."""
    schema = pa.schema([_compact(field) for field in table.schema])
    encodings = {
        field.name: "DELTA_BYTE_ARRAY" if pa.types.is_string(field.type) else "DELTA_BINARY_PACKED"
        for field in schema
        if not pa.types.is_floating(field.type)
    }
    pq.write_table(
        table.cast(schema), file, compression="zstd", compression_level=9, use_dictionary=False,
        column_encoding=encodings, write_statistics=False,
    )  # fmt: skip


def _compact(field: pa.Field) -> pa.Field:
    return pa.field(field.name, pa.int32()) if pa.types.is_integer(field.type) else field


def whole_state(module: nn.Module) -> dict[str, Tensor]:
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
