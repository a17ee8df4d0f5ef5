"""Exported model on disk: everything that ranking needs, in open formats whose readers execute no code.

::

    manifest.json               file list with checksums, see ``manifest.py``
    model.yaml                  model configuration, and how sequences are explored
    dataset.yaml                dataset card: features, buckets, rules
    tables.safetensors          tables looked up by id: NAME/values and, for int8 codes, NAME/scale
    dense.safetensors           dense parameters (ranker/…), and small tables that every batch reads in full
    vocabulary/FEATURE.parquet  raw ``value`` to table ``row``, except identifiers
    users.parquet, items.parquet   raw identifiers, rows of features and numbers; durations and statistics of videos
    vectors.safetensors         vectors of items, in the order of items.parquet: as tables; absent without any
    ensemble/                   see ``models/ensemble/io.py``; absent without an ensemble

All rows refer to the tables in this directory, which are not sorted by frequency as the dataset's are. Vocabulary rows
are in the order of the raw values, which costs no bytes to store. Users and items without a row of their own come last.

``runs/export_files.py`` writes these files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from a2gen_rec.artifact.entity_index import EntityIndex
from a2gen_rec.artifact.manifest import Manifest, read_manifest
from a2gen_rec.artifact.quantized_tables import QuantizedEmbeddings, QuantizedTable
from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.parquet_reader import read_table
from a2gen_rec.data.schema import ITEM_ID, USER_ID, Feature
from a2gen_rec.data.vectors import VectorTable, VectorTables
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.models.base import BaseRanker, TargetEncoding
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.models.ensemble.io import EnsembleCard, load_ensemble
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.factory import ranker_class
from a2gen_rec.utils import paths

SETTINGS, TABLES, DENSE = "model.yaml", "tables.safetensors", "dense.safetensors"
USERS, ITEMS, ENSEMBLE = "users.parquet", "items.parquet", "ensemble"
VECTORS = "vectors.safetensors"
ENTITY_TABLES = {"user": USERS, "item": ITEMS}
IDENTIFIERS = {"user": USER_ID, "item": ITEM_ID}


@dataclass(frozen=True)
class ModelSettings:
    """Settings of the model and its inference.

    Attributes:
        model: Model configuration.
        max_unexplored_mass: As in ``EvaluateConfig``.
        bucket_overhead_tokens: As in ``LoaderConfig``.
    """

    model: ModelConfig
    max_unexplored_mass: float
    bucket_overhead_tokens: int


class ExportedModel(nn.Module):
    """Stored tables and the ranker on top, in place of a ``RankingModel``; immutable, on the CPU."""

    def __init__(self, embeddings: QuantizedEmbeddings, ranker: BaseRanker[Any]) -> None:
        super().__init__()
        self.embeddings, self.ranker = embeddings, ranker

    def forward(self, batch: WindowBatch) -> TargetEncoding:
        encoded: TargetEncoding = self.ranker(self.embeddings(batch.sparse), batch)
        return encoded


@dataclass(frozen=True)
class Artifact:
    """Exported model in memory.

    Attributes:
        manifest: Manifest of its files.
        settings: Settings of the model.
        card: Dataset card.
        model: Model in evaluation mode, on the CPU.
        ensemble: Ensemble with its card, if any.
        users: Users of the dataset.
        items: Items of the dataset.
        vectors: Vectors of the items.
        vocabularies: Vocabulary feature -> raw value -> row, without identifiers (see ``users``, ``items``).
    """

    manifest: Manifest
    settings: ModelSettings
    card: DatasetCard
    model: ExportedModel
    ensemble: tuple[Ensemble, EnsembleCard] | None
    users: EntityIndex
    items: EntityIndex
    vocabularies: dict[str, dict[str, int]]
    vectors: VectorTables


def load_artifact(model_dir: str) -> Artifact:
    """Read and check an exported model.

    Raises:
        UserError: A file is missing, truncated, corrupted or incompatible, or the format is unsupported.
    """
    manifest = read_manifest(model_dir)
    settings, card = _read_settings(paths.join(model_dir, SETTINGS)), DatasetCard.load(model_dir)
    model = _read_model(model_dir, card, settings)
    ensemble = load_ensemble(paths.join(model_dir, ENSEMBLE)) if f"{ENSEMBLE}/ensemble.yaml" in manifest.files else None
    return Artifact(
        manifest=manifest,
        settings=settings,
        card=card,
        model=model,
        ensemble=ensemble,
        users=EntityIndex.read(
            paths.join(model_dir, USERS), "user", card.features_at("user"), numbers=card.numbers_at("user")
        ),
        items=EntityIndex.read(
            paths.join(model_dir, ITEMS),
            "item",
            card.features_at("item"),
            duration_feature(card),
            len(card.statistics),
            card.numbers_at("item"),
        ),
        vocabularies={
            feature.name: _read_vocabulary(paths.join(model_dir, vocabulary_file(feature)), feature)
            for feature in card.features
            if has_vocabulary(feature)
        },
        vectors=_read_vectors(paths.join(model_dir, VECTORS), card),
    )


def has_vocabulary(feature: Feature) -> bool:
    """Return whether a feature has a vocabulary file; identifiers are in the user and item files."""
    return feature.kind == "vocabulary" and IDENTIFIERS.get(feature.level) != feature.name


def duration_feature(card: DatasetCard) -> str:
    """Return the feature whose rows are buckets of the raw durations in the item file; empty if there is none."""
    duration = card.feedback.duration_feature if card.feedback is not None else ""
    return duration if any(feature.name == duration and feature.kind == "buckets" for feature in card.features) else ""


def vocabulary_file(feature: Feature) -> str:
    """Return the path of a feature's vocabulary within a dataset or an exported model."""
    return f"vocabulary/{feature.name}.parquet"


def _read_settings(file: str) -> ModelSettings:
    try:
        raw = paths.read_yaml(file)
        return ModelSettings(**{**raw, "model": ModelConfig(**raw["model"])})
    except (TypeError, KeyError, ConfigError) as error:
        raise UserError(f"{file}: invalid model configuration ({error})") from error


def _read_model(model_dir: str, card: DatasetCard, settings: ModelSettings) -> ExportedModel:
    ranker = ranker_class(settings.model)(card, settings.model)
    table_sizes = EmbeddingTables.from_card(card, settings.model)
    try:
        file = paths.join(model_dir, DENSE)
        dense = _read_tensors(file)
        ranker.load_state_dict(
            {name.removeprefix("ranker."): value for name, value in dense.items() if name.startswith("ranker.")}
        )
        full = {name: dense[f"table/{name}"] for name in table_sizes.full_tables}
        file = paths.join(model_dir, TABLES)
        tables = _read_tables(file, table_sizes.id_rows, settings, full)
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{file}: incompatible with its config, or corrupted ({lines[-1] if lines else error})"
        ) from error
    model = ExportedModel(tables, ranker).eval().requires_grad_(False)
    model.ranker.cache_token_table(tables.full_tables)
    return model


def _read_tables(
    file: str, rows: Mapping[str, int], settings: ModelSettings, full: Mapping[str, Tensor]
) -> QuantizedEmbeddings:
    with safe_open(paths.to_local_path(file), "pt") as stored:
        names = set(stored.keys())

        def read(name: str) -> QuantizedTable:
            values, scale = f"{name}/values", f"{name}/scale"
            table = QuantizedTable(stored.get_tensor(values), stored.get_tensor(scale) if scale in names else None)
            if table.values.shape != (rows[name], settings.model.dim):
                raise UserError(f"{file}: table {name!r} does not have the shape of the dataset card")
            return table

        return QuantizedEmbeddings(rows, read, full)


def _read_vectors(file: str, card: DatasetCard) -> dict[str, VectorTable]:
    """Read the vectors of the items.

    Raises:
        UserError: The file is missing, or has other vectors than the dataset card.
    """
    if not card.vectors:
        return {}
    try:
        stored, tables = _read_tensors(file), {}
        for vector in card.vectors:
            values, scale = stored[f"{vector.name}/values"].numpy(), stored.get(f"{vector.name}/scale")
            if values.ndim != 2 or values.shape[1] != vector.width:
                raise ValueError(f"vector {vector.name!r} does not have the width of the dataset card")
            tables[vector.name] = VectorTable(values, None if scale is None else scale.numpy())
        return tables
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{file}: incompatible with its dataset card, or corrupted ({error})") from error


def _read_tensors(file: str) -> dict[str, Tensor]:
    """Return copies of all tensors of a file: the library maps the file, so later changes to it would be visible."""
    with safe_open(paths.to_local_path(file), "pt") as stored:
        return {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118


def _read_vocabulary(file: str, feature: Feature) -> dict[str, int]:
    table = read_table(file, ["value", "row"])
    rows = table["row"].to_pylist()
    if not all(0 < row < feature.cardinality for row in rows):
        raise DataError(f"row must be in [1, {feature.cardinality})", file=file, field="row")
    return dict(zip(table["value"].to_pylist(), rows, strict=True))
