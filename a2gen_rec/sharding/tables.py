"""The embedding tables a dataset card and a model configuration ask for."""

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
    return whole_rows(len(card.actions), config)


def whole_rows(actions: int, config: ModelConfig) -> dict[str, int]:
    """The same for a vocabulary of so many actions."""
    return {ACTION: actions, TIME: config.time_buckets, GAP: config.time_buckets}


def table_rows(card: DatasetCard, config: ModelConfig) -> dict[str, int]:
    """Every table, name -> rows: one per user, item and context feature of the card, then the whole ones."""
    return {feature.name: feature.cardinality for feature in looked_up(card)} | whole_tables(card, config)


def looked_up(card: DatasetCard) -> list[Feature]:
    """The features whose ids a batch looks up."""
    return [*card.at_level("user"), *card.at_level("item"), *card.at_level("context")]
