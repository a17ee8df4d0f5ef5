"""The embedding tables a dataset card and a model configuration ask for."""

from collections.abc import Iterable

from torchrec.modules.embedding_configs import DataType

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.schema import DatasetCard, Feature

ACTION, TIME, GAP = "action", "time_bucket", "gap_bucket"
DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}  # of weights, as ``sharding.dtype`` names them


def whole_tables(card: DatasetCard, config: ModelConfig) -> dict[str, int]:
    """Small tables, name -> rows, that every batch looks up whole.

    Each of their rows is read by thousands of tokens and, while decoding, by actions and times not known in
    advance. Looking a table's few rows up once per batch costs less than once per token, on any sharding.
    """
    features = [*card.at_level("session"), *card.at_level("outcome")]
    return whole_rows(len(card.actions), [feature for feature in features if read_by(config, feature)], config)


def whole_rows(actions: int, features: Iterable[Feature], config: ModelConfig) -> dict[str, int]:
    """The same for a vocabulary of so many actions, and session and outcome features that the model reads."""
    always = {ACTION: actions, TIME: config.time_buckets, GAP: config.time_buckets}
    return always | {feature.name: feature.cardinality for feature in features}


def read_by(config: ModelConfig, feature: Feature) -> bool:
    """Whether a model of this configuration reads the feature."""
    if feature.level == "session":
        return config.session
    return feature.level != "outcome" or config.feedback != "off"


def table_rows(card: DatasetCard, config: ModelConfig) -> dict[str, int]:
    """Every table, name -> rows: one per user, item and context feature of the card, then the whole ones."""
    return {feature.name: feature.cardinality for feature in looked_up(card)} | whole_tables(card, config)


def looked_up(card: DatasetCard) -> list[Feature]:
    """The features whose ids a batch looks up."""
    return [*card.at_level("user"), *card.at_level("item"), *card.at_level("context")]
