"""The embedding tables a dataset card and a model configuration ask for."""

from collections.abc import Iterable

from torchrec.modules.embedding_configs import DataType

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.schema import DatasetCard, Feature

ACTION, TIME, GAP = "action", "time_bucket", "gap_bucket"
DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}  # of weights, as ``sharding.dtype`` names them


def full_tables(card: DatasetCard, config: ModelConfig) -> dict[str, int]:
    """Small tables, name -> rows, that every batch looks up whole.

    Each of their rows is read by thousands of tokens and, while decoding, by actions and times not known in
    advance. Looking a table's few rows up once per batch costs less than once per token, on any sharding.
    """
    features = [*card.features_at("session"), *card.features_at("outcome")]
    return full_table_rows(len(card.actions), [feature for feature in features if is_used_by(config, feature)], config)


def full_table_rows(actions: int, features: Iterable[Feature], config: ModelConfig) -> dict[str, int]:
    """The same for a vocabulary of so many actions, and session and outcome features that the model reads."""
    always = {ACTION: actions, TIME: config.time_buckets, GAP: config.time_buckets}
    return always | {feature.name: feature.cardinality for feature in features}


def is_used_by(config: ModelConfig, feature: Feature) -> bool:
    """Whether a model of this configuration reads the feature."""
    if feature.level == "session":
        return config.session_features
    return feature.level != "outcome" or config.feedback_encoding != "none"


def table_rows(card: DatasetCard, config: ModelConfig) -> dict[str, int]:
    """Every table, name -> rows: one per user, item and context feature of the card, then the whole ones."""
    return {feature.name: feature.cardinality for feature in id_features(card)} | full_tables(card, config)


def id_features(card: DatasetCard) -> list[Feature]:
    """The features whose ids a batch looks up."""
    return [*card.features_at("user"), *card.features_at("item"), *card.features_at("context")]
