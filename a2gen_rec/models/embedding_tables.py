"""Embedding tables that a dataset card and a model configuration require."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.modules.embedding_configs import DataType

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import Feature

ACTION, TIME, GAP = "action", "time_bucket", "gap_bucket"
DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
"""Value of ``sharding.dtype`` -> data type of the table weights."""

_KEY_PREFIX = "table_"


def module_key(table: str) -> str:
    """Return the key of a table among submodules. The prefix keeps names such as ``type`` apart from the attributes
    of ``torch.nn.Module``, which a ``ModuleDict`` rejects as keys."""
    return _KEY_PREFIX + table


def table_of_key(key: str) -> str:
    """Return the table of a key from :func:`module_key`."""
    return key.removeprefix(_KEY_PREFIX)


@dataclass(frozen=True)
class EmbeddingTables:
    """Embedding tables of one model.

    Attributes:
        id_features: Features with one table each, whose ids are looked up per batch: user, then item, then context.
        full_tables: Small tables, name -> rows, whose rows are all looked up once per batch. Thousands of tokens read
            each of these rows, and decoding needs the rows of actions and times that are not known in advance. One
            lookup of the full table per batch costs less than one lookup per token, under any sharding.
    """

    id_features: tuple[Feature, ...]
    full_tables: dict[str, int]

    @classmethod
    def from_card(cls, card: DatasetCard, config: ModelConfig) -> "EmbeddingTables":
        """Return the tables of a model trained on the card's dataset."""
        return cls.from_features(card.features, len(card.actions), config)

    @classmethod
    def from_features(cls, features: Sequence[Feature], num_actions: int, config: ModelConfig) -> "EmbeddingTables":
        """Return the tables for a vocabulary of ``num_actions`` actions and those ``features`` that the model uses."""
        ids = [feature for level in ("user", "item", "context") for feature in features if feature.level == level]
        small = [feature for level in ("session", "outcome") for feature in features if feature.level == level]
        full = {ACTION: num_actions, TIME: config.time_buckets, GAP: config.time_buckets}
        full |= {feature.name: feature.cardinality for feature in small if is_used_by(config, feature)}
        return cls(tuple(ids), full)

    @property
    def id_rows(self) -> dict[str, int]:
        """Name -> rows of the tables of :attr:`id_features`."""
        return {feature.name: feature.cardinality for feature in self.id_features}

    @property
    def rows(self) -> dict[str, int]:
        """Name -> rows of every table: those of :attr:`id_features`, then the full ones."""
        return self.id_rows | self.full_tables


def is_used_by(config: ModelConfig, feature: Feature) -> bool:
    """Return whether a model of this configuration uses the feature."""
    if feature.name in config.excluded_inputs:
        return False
    if feature.level == "session":
        return config.session_features
    return feature.level != "outcome" or config.feedback_encoding != "none"
