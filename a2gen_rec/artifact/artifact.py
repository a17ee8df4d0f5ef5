"""An exported model on disk: all that ranking needs, in open formats, reading which runs no code.

::

    manifest.json               what is here: see ``manifest.py``
    model.yaml                  the model's configuration, and how sequences are followed
    dataset.yaml                the dataset card: features, buckets, rules
    tables.safetensors          tables looked up by id: NAME/values and, of int8 codes, NAME/scale
    dense.safetensors           everything after the lookups (ranker/…), and small tables that are looked up whole
    vocabulary/FEATURE.parquet  raw ``value`` to table ``row``, identifiers aside
    users.parquet, items.parquet   raw identifiers and the rows of their features; of videos' lengths, the raw ones
    ensemble/                   as ``models/ensemble_store.py`` has it; absent without one

All rows are those of the tables here, not the dataset's, which go by frequency. Those of a vocabulary count up with its
raw values, which takes no bytes to tell; users and items without a row of their own come last.

``training/export_files.py`` writes them.
"""

import os
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
from a2gen_rec.data.parquet_reader import read_table
from a2gen_rec.data.schema import ITEM_ID, DatasetCard, Feature
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.models.base import BaseRanker, TargetEncoding
from a2gen_rec.models.embedding_tables import full_tables, id_features
from a2gen_rec.models.ensemble.io import EnsembleCard, load_ensemble
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.factory import ranker_class
from a2gen_rec.utils import paths

SETTINGS, TABLES, DENSE = "model.yaml", "tables.safetensors", "dense.safetensors"
USERS, ITEMS, ENSEMBLE = "users.parquet", "items.parquet", "ensemble"
CURRENT_POINTER = "CURRENT"
"""A file in a folder of models that names the one to serve."""
ENTITY_TABLES = {"user": USERS, "item": ITEMS}
IDENTIFIERS = {"user": "user_id", "item": ITEM_ID}


@dataclass(frozen=True)
class ModelSettings:
    """How the model is made and read.

    Attributes:
        max_error, group_cost: as in ``EvaluateConfig`` and ``LoaderConfig``.
    """

    model: ModelConfig
    max_unexplored_mass: float
    group_cost: int


class ExportedModel(nn.Module):
    """Stored tables and the ranker on top, in the place of a ``RankingModel``; on the CPU, to stay as it is."""

    def __init__(self, embeddings: QuantizedEmbeddings, ranker: BaseRanker[Any]) -> None:
        super().__init__()
        self.embeddings, self.ranker = embeddings, ranker

    def forward(self, batch: WindowBatch) -> TargetEncoding:
        encoded: TargetEncoding = self.ranker(self.embeddings(batch.sparse), batch)
        return encoded


@dataclass(frozen=True)
class Artifact:
    """An exported model in memory.

    Attributes:
        model: ready to predict, on the CPU.
        vocabularies: vocabulary feature -> raw value -> row; identifiers are in ``users`` and ``items``.
    """

    manifest: Manifest
    settings: ModelSettings
    card: DatasetCard
    model: ExportedModel
    ensemble: tuple[Ensemble, EnsembleCard] | None
    users: EntityIndex
    items: EntityIndex
    vocabularies: dict[str, dict[str, int]]


def resolve_model_dir(model: str) -> str:
    """The folder that a path leads to now: through links, and through a folder's ``CURRENT``.

    Raises:
        UserError: ``CURRENT`` names none.
    """
    pointer = paths.join(model, CURRENT_POINTER)
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
        ensemble=fused,
        users=EntityIndex.read(paths.join(folder, USERS), "user", card.features_at("user")),
        items=EntityIndex.read(paths.join(folder, ITEMS), "item", card.features_at("item"), duration_feature(card)),
        vocabularies={
            feature.name: _read_vocabulary(paths.join(folder, vocabulary_file(feature)), feature)
            for feature in card.features
            if has_vocabulary(feature)
        },
    )


def has_vocabulary(feature: Feature) -> bool:
    """Whether a feature has a vocabulary of its own; identifiers are in the catalogues."""
    return feature.kind == "vocabulary" and IDENTIFIERS.get(feature.level) != feature.name


def duration_feature(card: DatasetCard) -> str:
    """The feature whose rows are buckets of the raw lengths that catalogues have; empty if there is none."""
    duration = card.feedback.duration_feature if card.feedback is not None else ""
    return duration if any(each.name == duration and each.kind == "buckets" for each in card.features) else ""


def vocabulary_file(feature: Feature) -> str:
    """Where a feature's vocabulary is, in a dataset as in an exported model."""
    return f"vocabulary/{feature.name}.parquet"


def _read_settings(file: str) -> ModelSettings:
    try:
        raw = paths.read_yaml(file)
        return ModelSettings(**{**raw, "model": ModelConfig(**raw["model"])})
    except (TypeError, KeyError, ConfigError) as error:
        raise UserError(f"{file}: not a model's configuration that this version reads ({error})") from error


def _read_model(folder: str, card: DatasetCard, settings: ModelSettings) -> ExportedModel:
    ranker = ranker_class(settings.model)(card, settings.model)
    try:
        file = paths.join(folder, DENSE)
        dense = _read_tensors(file)
        ranker.load_state_dict(
            {name.removeprefix("ranker."): value for name, value in dense.items() if name.startswith("ranker.")}
        )
        whole = {name: dense[f"table/{name}"] for name in full_tables(card, settings.model)}
        file = paths.join(folder, TABLES)
        tables = _read_tables(
            file, {feature.name: feature.cardinality for feature in id_features(card)}, settings, whole
        )
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{file}: does not fit the model or is damaged ({lines[-1] if lines else error})") from error
    model = ExportedModel(tables, ranker).eval().requires_grad_(False)
    model.ranker.cache_token_table(tables.whole)
    return model


def _read_tables(
    file: str, rows: Mapping[str, int], settings: ModelSettings, whole: Mapping[str, Tensor]
) -> QuantizedEmbeddings:
    with safe_open(paths.to_local_path(file), "pt") as stored:
        names = set(stored.keys())

        def read(name: str) -> QuantizedTable:
            values, scale = f"{name}/values", f"{name}/scale"
            table = QuantizedTable(stored.get_tensor(values), stored.get_tensor(scale) if scale in names else None)
            if table.values.shape != (rows[name], settings.model.dim):
                raise UserError(f"{file}: table {name!r} is not of the dataset card's size")
            return table

        return QuantizedEmbeddings(rows, read, whole)


def _read_tensors(file: str) -> dict[str, Tensor]:
    """All tensors of a file, copied one by one: the library's are the file itself, whatever is done to it later."""
    with safe_open(paths.to_local_path(file), "pt") as stored:
        return {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118


def _read_vocabulary(file: str, feature: Feature) -> dict[str, int]:
    table = read_table(file, ["value", "row"])
    rows = table["row"].to_pylist()
    if not all(0 < row < feature.cardinality for row in rows):
        raise DataError(f"row is not in [1, {feature.cardinality})", file=file, field="row")
    return dict(zip(table["value"].to_pylist(), rows, strict=True))
